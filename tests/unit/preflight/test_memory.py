"""The memory formula against small cases counted by hand; its table; what is beside tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vopd.config.loading import build_config
from megatron_vopd.config.world import layouts
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.preflight.activations import layer_memory
from megatron_vopd.preflight.engine_memory import Engine
from megatron_vopd.preflight.memory import Machine, RankMemory, estimate, workload
from megatron_vopd.preflight.table import largest_line, memory_lines, memory_notice
from megatron_vopd.run.dry_run import bytes_beside_tensors
from megatron_vopd.types import Layout

FACTS = ModelFacts(
    "qwen3",
    num_layers=2,
    hidden_size=8,
    ffn_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    max_positions=64,
    norm_eps=1e-6,
    tied=False,
)
# qkv 16 x 8, proj 8 x 8, q- and k-norm 4 each, fc1 32 x 8, fc2 8 x 16, two norms of 8
LAYER = 128 + 64 + 8 + 256 + 128 + 16
TABLE = 32 * 8
WHOLE = 2 * LAYER + 2 * TABLE + 8
CPU = Machine("cpu")


def ranks(world: int = 1, machine: Machine = CPU, **sections: dict[str, Any]) -> list[RankMemory]:
    """Return the ranks of two prompts of 4 tokens, responses of 5: two rows of 8 tokens; fp32."""
    settings: dict[str, Any] = {
        "student": {"path": "org/a", "dtype": "fp32"},
        "teacher": {"path": "org/b", "dtype": "fp32"},
        "rollout": {"num_prompts": 2},
        "curriculum": {"kind": "fixed", "ladder": [5]},
        "data": {"train": "org/c", "max_prompt_tokens": 4},
        "train": {"max_tokens_per_microbatch": 9},
        "optimizer": {"distributed": False},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    config = build_config(settings)
    cuts = layouts(config, world)
    return estimate(config, dict.fromkeys(cuts, FACTS), cuts, machine)


def test_tokens_of_a_step() -> None:
    (only,) = ranks()
    assert only.phases["loss"]["hidden states"] == 2 * 5 * 8 * 4
    config = build_config(
        {
            "student": {"path": "org/a"},
            "teacher": {"path": "org/b"},
            "rollout": {"num_prompts": 6, "samples_per_prompt": 2},
            "curriculum": {"kind": "fixed", "ladder": [5]},
            "data": {"train": "org/c", "max_prompt_tokens": 4},
            "train": {"max_tokens_per_microbatch": 30},
        }
    )
    work = workload(config, num_replicas=2)
    # Six sequences of 8 tokens for each replica, in rows of 30.
    assert (work.row, work.response, work.num_rows, work.step_response) == (30, 30, 2, 30)


class TestHeld:
    def test_one_rank(self) -> None:
        held = ranks()[0].held
        assert held["student weights"] == 4 * WHOLE == held["gradients"]
        assert held["optimizer"] == 8 * WHOLE
        assert held["teacher weights"] == 4 * (WHOLE - TABLE)
        assert held["teacher head"] == 4 * TABLE

    def test_bf16_has_fp32_gradients_and_main_parameters(self) -> None:
        held = ranks(student={"dtype": "bf16"})[0].held
        assert (held["student weights"], held["gradients"]) == (2 * WHOLE, 4 * WHOLE)
        assert held["optimizer"] == 12 * WHOLE

    def test_the_distributed_optimizer_is_shared_out(self) -> None:
        shared = ranks(2, optimizer={"distributed": True})
        assert [memory.held["optimizer"] for memory in shared] == [4 * WHOLE] * 2
        whole = ranks(2)
        assert [memory.held["optimizer"] for memory in whole] == [8 * WHOLE] * 2

    def test_tensor_parallel_cuts_all_but_norms(self) -> None:
        own = 2 * ((LAYER - 24) // 2 + 24) + TABLE + 8
        assert [one.held["student weights"] for one in ranks(2, parallel={"tp": 2})] == [
            4 * own
        ] * 2
        # The KV head of a frozen model is repeated; the head is cut on the student's boundaries.
        teacher = 2 * ((LAYER - 24 + 64) // 2 + 24) + TABLE // 2 + 8
        for one in ranks(2, parallel={"tp": 2}, teacher={"tp": 2}):
            assert one.held["teacher weights"] == 4 * teacher
            assert one.held["teacher head"] == 4 * TABLE // 2

    def test_pipeline_stages_differ(self) -> None:
        first, last = ranks(2, parallel={"pp": 2}, teacher={"pp": 2})
        assert first.held["student weights"] == 4 * (LAYER + TABLE)
        assert last.held["student weights"] == 4 * (LAYER + TABLE + 8)
        assert first.held["teacher weights"] == 4 * (LAYER + TABLE)
        assert last.held["teacher weights"] == 4 * (LAYER + 8)
        assert "teacher head" not in first.held and last.held["teacher head"] == 4 * TABLE
        assert "loss" not in first.phases

    def test_experts_are_shared_by_ep_and_their_own_replicas(self) -> None:
        facts = replace(
            FACTS, model_type="qwen3_moe", num_experts=4, expert_ffn_size=6, experts_per_token=2
        )
        config = build_config(
            {
                "student": {"path": "org/a", "dtype": "fp32"},
                "teacher": {"path": "org/b", "ep": 4, "dtype": "bf16"},
                "parallel": {"ep": 2},
                "rollout": {"num_prompts": 4},
                "data": {"train": "org/c"},
            }
        )
        cuts = layouts(config, 4)
        one = estimate(config, dict.fromkeys(cuts, facts), cuts, CPU)[0]
        shared = 2 * (128 + 64 + 8 + 16 + 4 * 8) + 2 * TABLE + 8
        expert = 2 * 3 * 6 * 8
        assert one.held["student weights"] == 4 * (shared + 2 * expert)
        assert one.held["optimizer"] == 8 * (shared / 4 + 2 * expert / 2)
        assert one.held["teacher weights"] == 2 * (shared - TABLE + expert)


class TestPhases:
    def test_a_layer(self) -> None:
        one = Layout(1)
        cpu = layer_memory(FACTS, one, "cpu", 4, trained=True)
        # 6 hidden, 6 queries, 4 keys, 5 intermediate widths
        assert cpu.kept == 4 * (6 * 8 + 6 * 8 + 4 * 4 + 5 * 16)
        assert cpu.kept - cpu.kept_selective == 4 * 8 and cpu.kept_full == 4 * 8
        # In place of the keys: 5 / 2 of keys and values, recomputed if selective.
        cut = layer_memory(FACTS, Layout(2, cp=2), "cpu", 4, trained=True)
        assert cut.kept == cpu.kept + 4 * (5 * 4 - 4)
        assert cut.kept_selective == cpu.kept_selective
        local = [layer_memory(FACTS, Layout(4, cp=cp), "local", 2, trained=True) for cp in (1, 4)]
        assert local[1].kept - local[0].kept == 2 * 2 * 8 * (9 / 2 - 1)
        # Gradients of the repeated prefixes, of the prefixes, of the row: more than the MLP's.
        gradients = 2 * (2 * 8 * 9 / 2 + 2 * 4 * 9 / 2 + 2 * 4 * 4)
        assert local[1].backward == gradients + 2 * 2 * 8 > local[0].backward
        te = layer_memory(FACTS, one, "te", 2, trained=True)
        assert layer_memory(FACTS, Layout(4, cp=4), "te", 2, trained=True) == te
        assert te.kept == 2 * (4 * 8 + (8 + 2 * 4) + 8 + (2 * 8 + 4) + 3 * 16)
        cut = layer_memory(FACTS, Layout(2, tp=2), "te", 2, trained=False, sequence_parallel=True)
        # hidden by sequence, queries, the repeated keys and the MLP by tp
        assert cut.kept == 2 * (4 * 4 + (4 + 2 * 4) + 4 + (2 * 4 + 4) + 3 * 8)

    def test_loss_and_backward(self) -> None:
        loss, backward = ranks()[0].phases["loss"], ranks()[0].phases["backward"]
        kept = 9 * (2 * 768 + 8 * 8)
        assert loss["activations"] == kept + 9 * 8 * 4
        assert loss["logits of a chunk"] == 2 * 9 * 32 * 4
        assert loss["gradients of head and rows"] == 4 * TABLE + 9 * 8 * (4 + 4)
        assert backward["activations"] == kept + 9 * 4 * (2 * 16 + 2 * 8) + 4 * 2 * 8 * 16

    def test_a_chunk_bounds_the_logits(self) -> None:
        long = ranks(
            data={"max_prompt_tokens": 1000},
            curriculum={"ladder": [9000]},
            train={"max_tokens_per_microbatch": 10000},
        )
        assert long[0].phases["loss"]["logits of a chunk"] == 2 * 4096 * 32 * 4

    def test_early_stages_hold_more_microbatches(self) -> None:
        first, last = ranks(2, parallel={"pp": 2})
        passing = 9 * 4 * (2 * 16 + 2 * 8) + 4 * 2 * 8 * 16
        assert first.phases["backward"]["activations"] == 2 * 9 * (768 + 4 * 8) + passing
        assert last.phases["backward"]["activations"] == 9 * (768 + 8 * 8) + passing

    def test_an_engine_shares_the_gpu_of_one_rank_per_replica(self) -> None:
        gpu = Machine("te", 8e9)
        sections = {"parallel": {"tp": 2, "device": "cuda"}, "rollout": {"memory_fraction": 0.5}}
        memory = ranks(4, gpu, **sections)
        assert [one.phases["rollout"]["engine"] for one in memory] == [4e9, 0, 4e9, 0]
        assert memory[0].worst_phase == "push" and memory[0].peak > 4e9
        # It takes none of the memory of a run that samples from servers, or not at all.
        served = {"engine": "server", "urls": ["http://127.0.0.1:8000"]}
        assert ranks(4, gpu, **sections | {"rollout": served})[0].phases["rollout"]["engine"] == 0
        assert "lower rollout.memory_fraction" in str(memory_notice(memory[0], 4))

    def test_a_sleeping_engine_is_not_nothing(self) -> None:
        """Its process keeps a CUDA context, graphs and workspaces in all other phases."""
        gpu = Machine("te", 1e9)
        leader, other = ranks(2, gpu, parallel={"tp": 2})
        for phase in ("scoring", "backward", "update", "loss"):
            assert leader.phases[phase]["sleeping engine (assumed)"] == 2 * 2**30
            assert "sleeping engine (assumed)" not in other.phases[phase]
        for phase in ("rollout", "push"):
            assert leader.phases[phase]["engine context (assumed)"] == 2**29
        assert not any("assumed" in part for one in ranks()[0].phases.values() for part in one)
        assert "(assumed) is not yet measured on a GPU" in largest_line(leader, 1.0)
        assert "assumed" not in largest_line(ranks()[0], 1.0)

    def test_a_push_passes_through_buffers(self) -> None:
        """One for CUDA IPC that holds the largest tensor; two chunks under way for NCCL."""
        gpu = Machine("te", 80e9)
        assert ranks(machine=gpu)[0].held["IPC buffer"] == 512 * 2**20
        wide = replace(FACTS, vocab_size=151936, hidden_size=4096, tied=True)
        assert Engine(1.0, item_size=2).kept(wide) == {"IPC buffer": 151936 * 4096 * 2}
        # The embedding alone, larger than a chunk, and once more where it is packed.
        chunk = 151936 * 4096 * 2
        by_nccl = Engine(by_nccl=True, item_size=2).chunks(wide)
        assert by_nccl == {"NCCL chunks": 2 * chunk, "tensors of a chunk": chunk}
        served = {"engine": "server", "urls": ["http://127.0.0.1:8000"], "dtype": "fp32"}
        push = ranks(2, gpu, rollout=served, parallel={"tp": 2})
        assert push[0].phases["push"]["NCCL chunks"] == 2 * 4 * WHOLE
        assert "NCCL chunks" not in push[1].phases["push"]
        assert "NCCL chunks" not in ranks(rollout=served)[0].phases["push"], "on a CPU"

    def test_an_offloaded_teacher_is_there_while_it_scores(self) -> None:
        stays = ranks(machine=Machine("te"))[0]
        leaves = ranks(machine=Machine("te"), teacher={"offload": True})[0]
        assert "teacher weights" not in leaves.held
        assert leaves.phases["scoring"]["weights"] == stays.held["teacher weights"]
        assert leaves.host > stays.host == 0


def test_the_table_shows_each_stages_largest_rank() -> None:
    lines = memory_lines(ranks(4, parallel={"pp": 2, "tp": 2}))
    assert lines[0].split() == ["pipeline", "stage", "0", "1"]
    assert lines[1].split()[-2:] == ["0", "2"]
    assert sum(line.startswith("loss:") for line in lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_tensors_are_not_counted_beside_tensors() -> None:
    before = bytes_beside_tensors()
    tensor = torch.ones(16 * 2**20)
    view = tensor[1:]
    assert abs(bytes_beside_tensors() - before) < 8 * 2**20
    assert before > 50 * 2**20 and view.numel()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_the_memory_of_a_gpu_is_a_positive_number(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_vopd.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["check", "config.yaml", "--gpu-memory", text])
    assert ended.value.code == 2 and "--gpu-memory" in capsys.readouterr().err
