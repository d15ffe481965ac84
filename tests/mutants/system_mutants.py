"""Mutants of what carries the process: network, packs and steps on a device, predictors, FLOP counts."""

from mutant import mutant

FORWARD = "nn/test_fake_cuda.py::test_a_forward_stays_on_the_device_and_waits_for_nothing"
STEP = "training/test_fake_cuda.py::test_a_step_synchronizes_once_at_its_end_and_matches_the_cpu"
SAMPLED = "generation/test_fake_cuda.py::test_sampling_matches_the_cpu_with_known_transfers_only"

SYSTEM_MUTANTS = (
    mutant(
        "per-rank instead of global denominators",
        "training/test_step.py::test_the_loss_does_not_depend_on_the_number_of_ranks",
        (
            "training/step.py",
            "loss = velocity / plan.velocity_denominator + ",
            "loss = velocity / pack.velocity_mask.sum().clamp(min=1) + ",
        ),
    ),
    mutant(
        "the unconditional half knows the class",
        "generation/test_predictor.py",
        ("generation/predictor.py", "torch.full_like(labels, NO_CLASS)", "labels"),
    ),
    mutant(
        "FLOPs of every attention pattern counted as full",
        "packing/test_flops.py",
        (
            "packing/flops.py",
            "attended = attention_flops(spec, frames, height, width, text_tokens)",
            "attended = 4.0 * spec.num_layers * spec.hidden_size * keys**2",
        ),
    ),
    mutant(
        "the log rate used as the rate",
        "generation/test_predictor.py",
        (
            "generation/predictor.py",
            "rate_from_log(prediction.log_rate)",
            "prediction.log_rate.clamp(min=0)",
        ),
    ),
    mutant(
        "the forward pass reads a number on the host",
        f"{FORWARD}[fp32]",
        (
            "nn/dit.py",
            "frame_condition = self.time_embedding(pack.time)",
            "frame_condition = self.time_embedding(pack.time.clamp(max=pack.time.max().item()))",
        ),
    ),
    mutant(
        "row numbers made on the CPU",
        f"{FORWARD}[fp32]",
        ("nn/rows.py", "numbers = torch.arange(runs + 1, device=run.device)", "numbers = torch.arange(runs + 1)"),
    ),
    mutant(
        "constants sent to the device in every forward pass",
        "nn/test_fake_cuda.py::test_constants_go_to_the_device_once",
        ("nn/rope.py", "if device not in self._on_device:", "if device.type:"),
    ),
    mutant(
        "sums over runs of tokens with checks that the host waits for",
        "nn/test_fake_cuda.py::test_a_backward_stays_on_the_device_and_waits_for_nothing[fp32]",
        ("nn/rows.py", "offsets=offsets, axis=0, unsafe=True)", "offsets=offsets, axis=0)"),
    ),
    mutant(
        "a boolean index in a loss",
        f"{STEP}[fp32]",
        (
            "flow/loss.py",
            "return (error.square().sum(dim=1) * torch.where(mask, weight.float(), 0.0)).sum()",
            "return (error.square().sum(dim=1)[mask] * weight.float()[mask]).sum()",
        ),
    ),
    mutant(
        "places of insertion sites sought by what is observed",
        f"{STEP}[fp32]",
        (
            "training/diagnostics.py",
            "rate = torch.where(sites, rate_from_log(output.log_rate), 0.0).sum(dtype=torch.float64)",
            "rate = rate_from_log(output.log_rate)[torch.nonzero(sites).flatten()].sum(dtype=torch.float64)",
        ),
    ),
    mutant(
        "sums read in every micro-step",
        f"{STEP}[fp32]",
        ("training/step.py", "observe(output, pack)]))", "observe(output, pack)]).cpu())"),
    ),
    mutant(
        "a pack's layout left on the CPU",
        "training/test_fake_cuda.py::test_every_tensor_of_a_pack_arrives",
        ("packing/layout.py", "if isinstance(value, HoldsTensors):", "if False:"),
    ),
    mutant(
        "a pack used before its copy has arrived",
        f"{STEP}[fp32]",
        ("data/transfer.py", "        computing.wait_stream(copying)\n", ""),
    ),
    mutant(
        "a mask on the device where frames are computed",
        f"{SAMPLED}[plain]",
        (
            "generation/predictor.py",
            "torch.nonzero(self.live_frames(state)).flatten().to(velocity.device)",
            "self.live_frames(state).to(velocity.device)",
        ),
    ),
    mutant(
        "queries of kept frames with more segments than their keys",
        f"{SAMPLED}[finished frames kept, autocast]",
        (
            "generation/kv_cache.py",
            "cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),",
            "cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0), lengths.sum()[None]]).int(),",
        ),
    ),
)
