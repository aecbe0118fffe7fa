"""`vopd demo`: small models trained, distilled and checked from nothing."""
