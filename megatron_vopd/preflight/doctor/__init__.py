"""`vopd doctor`: what is installed here, what of it does not work, and how to mend it."""
