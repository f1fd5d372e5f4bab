"""Mistakes that the tests must catch, each with the tests that should: those of sums, processes, checkpoints and combinations."""

from __future__ import annotations

from tests.planted.fault import Fault

BASIC = "contracts/test_contracts.py"
TOGETHER = "contracts/test_contracts_composition.py"
LOOP = "contracts/test_contracts_loop.py"
PAIR = "contracts/test_contracts_processes.py"
RESULTS = "contracts/test_contracts_results.py"
DEFAULTS = "contracts/test_contracts_defaults.py"

FAULTS = (
    Fault(
        "a wrong denominator: each micro-batch counts as one unit",
        "training/objective.py",
        "return [(float(batch.supervised),) for batch in batches]",
        "return [(1.0,) for batch in batches]",
        (BASIC,),
    ),
    Fault(
        "gradients are not summed over processes",
        "training/engine.py",
        "                    self.world.sum(trained.gradient)",
        "                    pass",
        (PAIR,),
    ),
    Fault(
        "observed gradients are not summed over processes",
        "tune/change.py",
        "return total(tune.dense[slot, place])",
        "return tune.dense[slot, place]",
        (PAIR,),
    ),
    Fault(
        "callbacks hear of steps in the first process only",
        "training/engine.py",
        "            if kept.callback.after_step is not None and self.tune.turns.moves(kept.slot, now):",
        "            if kept.callback.after_step is not None and self.world.is_first:",
        (PAIR,),
    ),
    Fault(
        "each process reports its own parts of the loss",
        "training/engine.py",
        "            self._together(work.parts),",
        "            work.parts,",
        (PAIR,),
    ),
    Fault(
        "what techniques remember is not saved",
        "training/checkpoint.py",
        'for kind, states in (("state", engine.states), ("best", engine.best_states)):',
        'for kind, states in (("best", engine.best_states),):',
        (LOOP,),
    ),
    Fault(
        "a snapshot is not saved",
        "training/checkpoint.py",
        '        values.update({f"snapshot|{name}|{key}": value for key, value in snapshot.items()})',
        "        pass",
        (LOOP,),
    ),
    Fault(
        "what stands still is not saved",
        "training/checkpoint.py",
        'values.update({f"still|{name}": one.forgotten for name, one in engine.tune.trained.items() if one.still})',
        "pass",
        (LOOP,),
    ),
    Fault(
        "moments are not restored",
        "training/checkpoint.py",
        "            engine.chain.load({rest: value})",
        "            pass",
        (LOOP,),
    ),
    Fault(
        "the model stays in evaluation mode after it was measured",
        "training/loop.py",
        "    engine.tune.model.train()\n    if plans.best is None or not counts:",
        "    if plans.best is None or not counts:",
        (LOOP,),
    ),
    Fault(
        "the best numbers are not brought back",
        "training/loop.py",
        "        engine.go_back_to_best()",
        "        pass",
        (LOOP,),
    ),
    Fault(
        "patience lasts one evaluation too long",
        "training/loop.py",
        "progress.since_best >= plans.patience",
        "progress.since_best > plans.patience",
        (LOOP,),
    ),
    Fault(
        "draws of a step are not keyed",
        "training/engine.py",
        '        torch.manual_seed(draws.seed_of(now.seed, "step", now.step, self.world.rank))',
        "        pass",
        (LOOP,),
    ),
    Fault(
        "a snapshot shares its numbers with what trains",
        "tune/change.py",
        'values[f"master|{name}"] = one.master.detach().clone()',
        'values[f"master|{name}"] = one.master.detach()',
        (LOOP,),
    ),
    Fault(
        "what is put back is not pushed to the model",
        "tune/change.py",
        "            put_tap(tune, one)\n        tune.push(one)\n",
        "            put_tap(tune, one)\n",
        (LOOP,),
    ),
    Fault(
        "numbers that left are not part of a snapshot",
        "tune/change.py",
        "return sorted({place.parameter for place in mine if place is not None})",
        "return []",
        (LOOP,),
    ),
    Fault(
        "a step without targets is taken all the same",
        "training/objective.py",
        "return not any(number for several in data or units for number in several)",
        "return False",
        (LOOP,),
    ),
    Fault(
        "what stands still gets gradients",
        "tune/change.py",
        "                _remember(tune, one)\n        one.leaf.requires_grad_(not one.still)\n",
        "                _remember(tune, one)\n",
        (TOGETHER,),
    ),
    Fault(
        "the base of a weight is what a selection began with",
        "tune/attach.py",
        "                    _begin_again(tune, one, one.place, tune.altered[name])",
        "                    pass",
        (TOGETHER,),
    ),
    Fault(
        "what stands still moves once an earlier state was looked at",
        "tune/change.py",
        "        # What is made anew here must not move in a step in which it stands still.\n"
        "        one.leaf.requires_grad_(not one.still)\n",
        "",
        (TOGETHER,),
    ),
    Fault(
        "a step that is not taken drops optimizer state",
        "training/engine.py",
        "        looked = self._look(batches, now)\n",
        "        self.tune.freeze(now)\n        looked = self._look(batches, now)\n",
        (LOOP,),
    ),
    Fault(
        "a penalty of a technique stands for the objective",
        "methods/weight_delta/adalora.py",
        "weight=orthogonality, penalty=True",
        "weight=orthogonality",
        (BASIC,),
    ),
    Fault(
        "the last of several token weights alone counts",
        "training/objective.py",
        "weight_N = weight_N * _weighed(one.weight.weigh",
        "weight_N = _weighed(one.weight.weigh",
        (TOGETHER,),
    ),
    Fault(
        "the wrong sign: a start is added to the weight that it should be taken out of",
        "tune/attach.py",
        "values.copy_(values.to(torch.promote_types(values.dtype, delta_OI.dtype)) - delta_OI)",
        "values.copy_(values.to(torch.promote_types(values.dtype, delta_OI.dtype)) + delta_OI)",
        (BASIC, TOGETHER),
    ),
    Fault(
        "a technique's own optimizer or transform takes everything",
        "training/chain.py",
        "return (not self.own or trained.slot == self.slot) and",
        "return",
        (TOGETHER,),
    ),
    Fault(
        "a second claim on the same numbers is let through",
        "tune/attach.py",
        "        if bool((mine & _claim(tune, other.place, other.form, other.index)).any()):",
        "        if False:",
        (TOGETHER,),
    ),
    Fault(
        "moments do not follow entries that are rearranged",
        "training/chain.py",
        "                    state[key] = migrate(value, trained.axis, take, old_size)",
        "                    state[key] = torch.zeros_like(trained.master, dtype=value.dtype)",
        (TOGETHER, LOOP),
    ),
    Fault(
        "rules over the step see one process's targets",
        "training/rules.py",
        "    whole = world.gather(local)\n",
        "    whole = local\n",
        (PAIR,),
    ),
    Fault(
        "a forgotten mask: virtual tokens count as token 0 of a table",
        "tune/taps.py",
        "table.index_add_(0, ids.clamp(min=0), gy.to(table.dtype) * (ids >= 0)[:, None])",
        "table.index_add_(0, ids.clamp(min=0), gy.to(table.dtype))",
        (TOGETHER,),
    ),
    Fault(
        "a default changed",
        "methods/selective/half.py",
        "    share: float = 0.5,",
        "    share: float = 0.4,",
        (DEFAULTS,),
    ),
)
