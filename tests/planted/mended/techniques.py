"""What techniques see, hold, draw and compare."""

from __future__ import annotations

from tests.planted.fault import Fault

DROPOUT = "unit/test_dropout.py"
FP64 = "contracts/test_contracts_fp64.py"
ODD = "faults/test_faults_odd_parts.py"
PAIR = "contracts/test_contracts_processes.py::test_faults_2_and_4_two_processes_equal_one"

FAULTS = (
    # Dropout, and choices that each process makes for itself.
    Fault(
        "dropout acts wherever gradients are wanted, so that two looks at the same gradients differ",
        "draws.py",
        "    if not share or found is None:\n        return x\n",
        "    if not share or found is None:\n        return torch.nn.functional.dropout(x, share, torch.is_grad_enabled())\n",
        (f"{DROPOUT}::test_who_looks_at_the_model_with_gradients_sees_no_dropout[lora]",),
    ),
    Fault(
        "a model in evaluation mode drops numbers where gradients are wanted",
        "draws.py",
        "    if not share or found is None:\n        return x\n",
        "    if not share or found is None:\n        return torch.nn.functional.dropout(x, share, torch.is_grad_enabled())\n",
        (f"{DROPOUT}::test_a_model_that_is_only_run_drops_nothing[adapter]",),
    ),
    Fault(
        "dropout follows from the split into micro-batches and processes",
        "draws.py",
        "    key_N, name, told = found\n",
        "    key_N, name, told = torch.randint(1 << 62, found[0].shape), found[1], found[2]\n",
        (f"{DROPOUT}::test_any_split_and_packing_drop_the_same[loca]",),
    ),
    Fault(
        "processes that train different numbers go on without a word",
        "training/agreement.py",
        "    if world.size == 1:\n        return\n    everyone",
        "    if world.size > 0:\n        return\n    everyone",
        (PAIR,),
    ),
    # What is observed, against what optimizers get and masters hold.
    Fault(
        "new entries are seeded with gradients that were not clipped",
        "training/engine.py",
        "            self.tune.observe(self.world.sum, self.chain.received, self.chain.factor)",
        "            self.tune.observe(self.world.sum, self.chain.received, lambda names: 1.0)",
        ("unit/test_spiel.py::test_new_entries_are_seeded_with_gradients_as_the_optimizer_gets_them[0.01]",),
    ),
    Fault(
        "a penalty is of the rounded weights of the model",
        "methods/selective/lt_sft.py",
        "            _distance(one.value, one.anchor) for one",
        "            _distance(one.leaf, one.anchor) for one",
        ("unit/test_lt_sft.py::test_the_penalty_of_a_model_in_bf16_is_of_what_its_masters_hold",),
    ),
    Fault(
        "techniques choose by the rounded weights of the model",
        "training/services.py",
        "        return whole(self._tune.held(place))",
        "        return whole(self._tune.region(place).detach())",
        ("unit/test_lift.py::test_entries_of_a_model_in_bf16_are_ranked_as_their_masters_hold_them",),
    ),
    Fault(
        "gradients behind a step are looked at where bf16 rounds the step away",
        "training/calibrate.py",
        "            values = parameter.clone() if narrow else tune.widened(name)",
        "            values = parameter.clone()",
        ("unit/test_calibrate.py::test_a_model_in_bf16_is_looked_at_from_steps_that_bf16_rounds_away",),
    ),
    Fault(
        "scales near 1 are rounded to 1 in training and merged as they are",
        "methods/weight_delta/said.py",
        '    wide = frozenset({"vector", "scale"})',
        "    wide = frozenset[str]()",
        ("unit/test_said.py::test_a_model_in_bf16_trains_with_the_scales_that_are_merged",),
    ),
    Fault(
        "locations and coefficients are rounded in training and merged as they are",
        "methods/weight_delta/loca.py",
        '        wide=frozenset({"coefficients", "rows", "columns"}),',
        "        wide=frozenset(),",
        ("unit/test_loca.py::test_a_model_in_bf16_trains_with_what_is_merged",),
    ),
    Fault(
        "offsets of a context are rounded before they are added",
        "methods/prompt/cpt.py",
        '        wide=frozenset({"context_PD", "offset_PD"}),',
        "        wide=frozenset(),",
        ("unit/test_cpt.py::test_of_a_model_in_bf16_only_the_sum_of_embedding_and_offset_is_rounded",),
    ),
    Fault(
        "gradients of locations are bounded in each pass and not in the step",
        "methods/weight_delta/_cosine.py",
        "        return (size - 1) * 0.5 * coefficient_K * difference_K * moves_K",
        "        return (size - 1) * (0.5 * coefficient_K * difference_K).clamp(-1.0, 1.0) * moves_K",
        ("unit/test_loca.py::test_the_gradients_of_a_step_are_bounded_and_not_those_of_its_passes",),
    ),
    # Two sides of a comparison.
    Fault(
        "targets of a context count into what a term makes of each row",
        "training/objective.py",
        'seen = seen.of_own() if minimized.term.unit in ("row", "group") else seen',
        "seen = seen",
        ("unit/test_cpt.py::test_a_term_over_rows_is_of_the_rows_own_targets[sizes0]",),
    ),
    Fault(
        "a row without targets is counted as one with those of a context",
        "training/objective.py",
        "            batches = [batch.own() for batch in batches]\n            if counts:",
        "            if counts:",
        ("unit/test_cpt.py::test_a_term_over_rows_is_of_the_rows_own_targets[sizes0]",),
    ),
    Fault(
        "targets of a context count into what a weight makes of each row",
        "training/objective.py",
        "    seen = view if virtual else view.of_own()\n",
        "    seen = view\n",
        ("contracts/test_contracts_composition.py::test_rules_over_rows_see_the_rows_own_targets[answer_coverage]",),
    ),
    Fault(
        "the base reads clean rows where the model reads masked ones",
        "training/services.py",
        "            tune, reading, pack=pack,",
        "            tune, reading if trains else batch, pack=pack,",
        ("parity/test_f_divergence.py::test_the_reward_of_a_model_that_is_its_base_is_zero_whatever_it_reads",),
    ),
    Fault(
        "the base reads clean embeddings where the model reads noisy ones",
        "training/services.py",
        "            tune, reading, pack=pack, embed=embed, blocks=change,",
        "            tune, reading, pack=pack, embed=embed if trains else None, blocks=change,",
        ("parity/test_f_divergence.py::test_the_reward_of_a_model_that_is_its_base_is_zero_whatever_it_reads",),
    ),
    Fault(
        "losses of two points are compared with other draws of dropout",
        "training/engine.py",
        "        with evaluating(self._engine.tune.model):\n            self.gather",
        "        with torch.no_grad():\n            self.gather",
        (f"{DROPOUT}::test_two_points_are_compared_without_dropout",),
    ),
    # Defaults and what a step is made of.
    Fault(
        "new blocks have the deviation of the family and not of the model",
        "models/parts.py",
        "    return next((float(value) for value in named if value), None)",
        "    return next((0.02 for value in named if value), None)",
        ("unit/test_layer_depth.py::test_new_blocks_have_the_deviation_of_the_models_own_configuration",),
    ),
    Fault(
        "shifts are learned only where the model has biases, as few models do",
        "methods/representation_edit/ssf.py",
        'shift: ShiftWhere = "everywhere"',
        'shift: ShiftWhere = "foldable"',
        ("unit/test_ssf.py::test_every_channel_that_is_scaled_is_shifted[llama]",),
    ),
    Fault(
        "a plan does not say that shifts stay beside a model without biases",
        "tune/merge.py",
        "    return [slot for slot, lacks in found.items() if lacks]",
        "    return [slot for slot, lacks in found.items() if not lacks]",
        ("faults/test_faults_defaults.py::test_what_a_model_lacks_biases_for_is_said_before_training",),
    ),
    Fault(
        "what a choice of tensors really costs is told to nobody",
        "methods/selective/greentrainer.py",
        '    return {"greentrainer backward share": state["backward share"]}',
        "    return {}",
        ("unit/test_greentrainer.py::test_what_a_choice_really_costs_is_logged_and_importance_is_that_for_cross_entropy",),
    ),
    Fault(
        "decay draws slices that begin at the base towards zero",
        "methods/selective/_units.py",
        'index.flatten(), decay="start")',
        "index.flatten())",
        ("unit/test_s2ft.py::test_weight_decay_pulls_towards_the_base",),
    ),
    Fault(
        "decay acts on vectors that stand side by side in a matrix",
        "methods/representation_edit/lofit.py",
        '        undecayed=frozenset({"scale", "offset"}),\n',
        "",
        ("unit/test_lofit.py::test_neither_scales_nor_offsets_decay",),
    ),
    Fault(
        "a prompt's learning rate is a multiple of the most careful partner's",
        "tune/attach.py",
        "            one.rate = value.own_rates[name] / services.now.run_rate",
        "            one.rate = 1000.0 * value.own_rates[name]",
        ("unit/test_promot.py::test_the_prompt_has_a_learning_rate_of_its_own[2e-05]",),
    ),
    # Devices without fp64.
    Fault(
        "a step sums its losses in fp64 on a device that has none",
        "training/objective.py",
        '        nll=machine.total(view["nll"]),',
        '        nll=float(view["nll"].detach().to(dtype=torch.float64).sum()),',
        (f"{FP64}::test_no_technique_asks_a_device_for_fp64_that_has_none[term-cross_entropy]",),
    ),
    Fault(
        "a technique computes in fp64 on a device that has none",
        "methods/loss_term/_coverage.py",
        "    return machine.computed_wide(factor, surprisal)",
        "    return factor(surprisal.type(torch.float64))",
        (f"{FP64}::test_no_technique_asks_a_device_for_fp64_that_has_none[term-dco]",),
    ),
    Fault(
        "draws need fp64 on a device that has none",
        "draws.py",
        "    return machine.widest((mixed",
        "    return torch.Tensor.double((mixed",
        (f"{FP64}::test_draws_in_fp32_are_those_in_fp64_cut_short",),
    ),
    Fault(
        "a line that no test walks widens to fp64",
        "training/packing.py",
        "    mine, other = machine.widened(mine), machine.widened(other)",
        "    mine, other = mine.double(), other.double()",
        (f"{FP64}::test_nobody_else_widens_to_fp64",),
    ),
    # Parts that are shaped like none of ours.
    Fault(
        "gradients that are the same on every process are summed again",
        "training/engine.py",
        '        several = self.source.gives >= {"all", "gradients"}',
        '        several = "all" in self.source.gives',
        (PAIR,),
    ),
    Fault(
        "an objective without a gradient trains nothing, and the run is called finished",
        "training/engine.py",
        "        self._refuse_untouched(work)\n        if not passes",
        "        if not passes",
        (f"{ODD}::test_an_objective_without_a_gradient_is_refused_at_its_first_step",),
    ),
    Fault(
        "a trained number without a dimension breaks a run off behind its last step",
        "runs/train.py",
        "whole(one.master.detach()).cpu().reshape(-1).view(torch.uint8)",
        "whole(one.master.detach()).cpu().contiguous().view(torch.uint8)",
        (f"{ODD}::test_a_trained_number_without_a_dimension_is_trained_and_told",),
        raises="cannot be 0 to view",
    ),
    Fault(
        "a look at shapes in the midst of a run puts them into the place of the weights",
        "training/dryrun.py",
        "    tune.only_shapes = True\n",
        "    tune.only_shapes = False\n",
        (f"{ODD}::test_estimating_memory_in_the_midst_of_a_run_leaves_its_weights_alone[full]",),
    ),
    Fault(
        "what all edits of a technique share does not train",
        "tune/attach.py",
        "        edit = Edit(slot, place, value=value, shared=shared)",
        "        edit = Edit(slot, place, value=value, shared=None if shared is None else shared.now())",
        (f"{ODD}::test_what_all_edits_share_trains_once_and_is_opened_again",),
    ),
)
