"""Mutants of the process: clocks, delays, insertion, tasks, targets and the sampler."""

from mutant import mutant

LAWS, SAMPLER = "flow/test_sampler_laws.py", "flow/test_sampler.py"
EXTENDED, ORACLE = "flow/test_extended_time.py", "evaluation/oracles/test_gaussian.py"
TARGETS = f"{ORACLE}::test_the_oracle_is_the_conditional_mean_of_the_real_targets"
FIXED = f"{LAWS}::test_thinning_gives_a_fixed_length_to_every_clip[10]"
GAPS = f"{LAWS}::test_known_gaps_are_filled_exactly[10]"

PROCESS_MUTANTS = (
    mutant(
        "hazard without 1 / (1 - kappa)",
        FIXED,
        ("flow/schedule.py", "return (then - now) / (1 - now)", "return then - now"),
        ("flow/schedule.py", "        if step == num_steps - 1:\n            return 1.0\n", ""),
    ),
    mutant(
        "insertion ends a step early",
        FIXED,
        ("flow/schedule.py", "        if step == num_steps - 1:\n            return 1.0\n", "        num_steps += 1\n"),
    ),
    mutant(
        "rates halved",
        FIXED,
        (
            "flow/sampler.py",
            'rates = rate.detach().to("cpu", torch.float64).numpy()',
            'rates = rate.detach().to("cpu", torch.float64).numpy() / 2',
        ),
    ),
    mutant(
        "inserted frame takes its neighbor's clock",
        f"{SAMPLER}::test_frames_keep_their_order_and_identity",
        (
            "flow/sampler.py",
            "born_step=torch.where(new, born, state.born_step[take])",
            "born_step=state.born_step[take]",
        ),
    ),
    mutant(
        "right total, wrong gap",
        GAPS,
        (
            "flow/insertion.py",
            "return np.diff(level, axis=1)[clip, rank].astype(np.int64)",
            "return np.diff(level, axis=1)[clip, clip_frames[clip] - 1 - rank].astype(np.int64)",
        ),
    ),
    mutant(
        "insertion one slot left",
        f"{SAMPLER}::test_a_frame_is_inserted_right_of_its_own_site",
        (
            "flow/sampler.py",
            "is_new[np.arange(len(counts)) + np.cumsum(counts) - counts] = False",
            "is_new[np.arange(len(counts)) + np.cumsum(counts)] = False",
        ),
    ),
    mutant(
        "missing count off by one at the clip's end",
        f"{TARGETS}[text to video]",
        ("flow/extended_time.py", "end = self.num_frames[:, None]\n", "end = self.num_frames[:, None] - 1\n"),
    ),
    mutant(
        "missing counts taken left of a frame",
        f"{EXTENDED}::test_five_frames_worked_example",
        (
            "flow/extended_time.py",
            "return torch.where(self.visible, next_visible - place - 1, 0)",
            "return torch.where(self.visible, (next_visible - place - 1).roll(1, dims=1), 0)",
        ),
    ),
    mutant(
        "passive frames insert",
        f"{SAMPLER}::test_context_stays_and_nothing_comes_right_of_a_passive_frame",
        (
            "flow/task.py",
            "return is_generated(roles) | (roles == Role.CONTEXT_ACTIVE)",
            "return is_generated(roles) | is_context(roles)",
        ),
    ),
    mutant(
        "context denoised",
        f"{SAMPLER}::test_context_stays_and_nothing_comes_right_of_a_passive_frame",
        (
            "flow/sampler_state.py",
            "return is_generated(self.roles) & (self.age < self.num_inference_steps)",
            "return self.age < self.num_inference_steps",
        ),
        (
            "flow/sampler_state.py",
            "return torch.where(is_generated(state.roles), sizes[state.age], 0.0)",
            "return sizes[state.age]",
        ),
    ),
    mutant(
        "last step short of 1",
        f"{SAMPLER}::test_the_last_step_lands_on_one_exactly",
        (
            "flow/sampler_state.py",
            "torch.arange(state.num_inference_steps + 1, dtype=torch.float64) / state.num_inference_steps",
            "torch.arange(state.num_inference_steps + 1, dtype=torch.float64) / (state.num_inference_steps + 1)",
        ),
    ),
    mutant(
        "shift only in training",
        f"{SAMPLER}::test_times_are_the_shifted_steps_since_birth",
        (
            "flow/sampler_state.py",
            "own = shift_time(self.age.double() / self.num_inference_steps, self.time_shift)",
            "own = self.age.double() / self.num_inference_steps",
        ),
        ("flow/sampler_state.py", "shift_time(grid, state.time_shift).diff()", "grid.diff()"),
    ),
    mutant(
        "shift only in sampling",
        f"{EXTENDED}::test_shown_time_is_the_shifted_own_time_and_the_plain_clock_for_context",
        (
            "flow/extended_time.py",
            "own = shift_time(self.frame_time.clamp(0, 1), self.time_shift)",
            "own = self.frame_time.clamp(0, 1)",
        ),
    ),
    mutant(
        "velocity loss on terminal frames",
        f"{EXTENDED}::test_five_frames_worked_example",
        (
            "flow/extended_time.py",
            "return self.visible & is_generated(self.roles) & (self.frame_time < 1)",
            "return self.visible & is_generated(self.roles)",
        ),
    ),
    mutant(
        "insertion loss after the clock's end",
        f"{EXTENDED}::test_five_frames_worked_example",
        (
            "flow/extended_time.py",
            "return self.visible & may_insert(self.roles) & (self.global_time < 1)[:, None]",
            "return self.visible & may_insert(self.roles)",
        ),
    ),
    mutant(
        "clock hidden from context frames in sampling",
        f"{LAWS}::test_with_no_start_frame_the_clock_that_a_context_frame_is_shown_is_enough",
        (
            "flow/sampler_state.py",
            "return torch.where(is_context(self.roles), self._clock(), own)",
            "return torch.where(is_context(self.roles), 1.0, own)",
        ),
    ),
    mutant(
        "clock hidden from context frames in training",
        f"{EXTENDED}::test_shown_time_is_the_shifted_own_time_and_the_plain_clock_for_context",
        (
            "flow/extended_time.py",
            "return torch.where(is_context(self.roles), self.global_time.clamp(0, 1)[:, None], own)",
            "return torch.where(is_context(self.roles), 1.0, own)",
        ),
    ),
    mutant(
        "a fresh U per site in thinning",
        FIXED,
        (
            "flow/insertion.py",
            "counts = whole_counts(rates, cu_frames, may_insert, uniforms[cu_frames[:-1], 0])",
            "counts = np.where(may_insert, np.floor(rates + uniforms[:, 0]), 0.0).astype(np.int64)",
        ),
    ),
    mutant(
        "one U for all steps in thinning",
        (
            f"{LAWS}::test_thinning_keeps_the_length_law_of_four_lengths",
            f"{LAWS}::test_gaps_of_unknown_size_keep_their_joint_law",
        ),
        ("flow/sampler.py", "epoch=state.step + 1,", "epoch=1,"),
    ),
    mutant(
        "active and passive roles swapped",
        "data/test_pack.py::test_model_roles_are_generated_active_or_passive",
        ("data/pack.py", "int(ModelRole.ACTIVE), generated", "int(ModelRole.PASSIVE), generated"),
        ("data/pack.py", "int(ModelRole.PASSIVE), active", "int(ModelRole.ACTIVE), active"),
    ),
    mutant(
        "no importance weights",
        "flow/test_prior.py",
        (
            "flow/prior.py",
            "return torch.where(below, early, late), weight",
            "return torch.where(below, early, late), torch.ones_like(weight)",
        ),
    ),
    mutant(
        "delays by kappa instead of its inverse",
        f"{TARGETS}[image to video]",
        ("flow/delays.py", "schedule.inverse(u_delay.double())", "schedule.kappa(u_delay.double())"),
    ),
    mutant(
        "the clock as the noise level of all frames",
        "data/test_pack.py",
        (
            "data/pack.py",
            "interpolate(x_0, x_1, draws.shown_time[slot, frames])",
            "interpolate(x_0, x_1, draws.global_time[slot].clamp(0, 1).expand(len(frames)))",
        ),
    ),
    mutant(
        "the data as the condition of generated frames",
        "data/test_pack.py",
        ("data/pack.py", "condition=latent_tokens(torch.where(context, x_1, 0.0))", "condition=latent_tokens(x_1)"),
    ),
    mutant(
        "velocity from data to noise",
        f"{TARGETS}[text to video]",
        ("flow/path.py", "return torch.sub(x_1, x_0)", "return torch.sub(x_0, x_1)"),
    ),
    mutant(
        "fresh noise with standard deviation 0.8",
        "flow/test_noise.py",
        (
            "flow/noise.py",
            "radius = np.sqrt(-2 * np.log1p(-u[..., 0]))",
            "radius = 0.8 * np.sqrt(-2 * np.log1p(-u[..., 0]))",
        ),
    ),
    mutant(
        "fresh noise not keyed by birth step",
        f"{SAMPLER}::test_frames_keep_their_order_and_identity",
        (
            "flow/sampler.py",
            "fresh_noise(state.seeds.numpy()[clip], born, slots,",
            "fresh_noise(state.seeds.numpy()[clip], 0, slots,",
        ),
    ),
    mutant(
        "the velocity's guidance scale on the rate",
        "flow/test_guidance.py",
        (
            "flow/guidance.py",
            "mix(conditional.log_rate, unconditional.log_rate, insertion_scale)",
            "mix(conditional.log_rate, unconditional.log_rate, scale)",
        ),
    ),
)
