"""Phases, ends of runs, steps without rows: clocks that did not know of each other."""

from __future__ import annotations

from tests.planted.fault import Fault

LOOP = "contracts/test_contracts_loop.py"
PHASES = "contracts/test_contracts_phases.py"
TURNS = "unit/test_turns.py"

_CLOCKS_OF_THEIR_OWN = (
    "tune/turns.py",
    "                    spans |= {other: _without(spans[other], mine) for other in self._frees - settled}",
    "                    spans |= {}",
)
"""Taken out, a technique's phases are shares of all steps, whoever trains alone meanwhile."""

FAULTS = (
    # Ends of runs.
    Fault(
        "what a technique makes of the end of a stage is overwritten with the best state",
        "training/loop.py",
        """    # First, so that the result is what techniques make of it when a stage ends.
    if plans.best is not None:
        engine.go_back_to_best()
    for kept in engine.callbacks:
        if kept.callback.after_stage is not None:
            kept.callback.after_stage(kept.state, engine.services(kept.slot, clock.at(clock.steps - 1, epoch=0.0)))
""",
        """    for kept in engine.callbacks:
        if kept.callback.after_stage is not None:
            kept.callback.after_stage(kept.state, engine.services(kept.slot, clock.at(clock.steps - 1, epoch=0.0)))
    if plans.best is not None:
        engine.go_back_to_best()
""",
        (f"{LOOP}::test_patience_ends_a_run_with_its_best_numbers[callback-average]",),
    ),
    Fault(
        "callbacks act at the end of a stage on what they knew last, not on what they knew at the best state",
        "training/engine.py",
        "        for slot, state in self.best_states.items():",
        "        for slot, state in list(self.best_states.items())[:0]:",
        (f"{LOOP}::test_patience_ends_a_run_with_its_best_numbers[callback-average]",),
    ),
    Fault(
        "the best state is one of an earlier phase",
        "training/loop.py",
        "    if plans.best is None or not counts:",
        "    if plans.best is None:",
        (f"{PHASES}::test_the_end_is_what_the_card_says[lofit-alone]",),
    ),
    Fault(
        "patience runs out in an earlier phase, since going back to its start is no improvement",
        "training/loop.py",
        "    if plans.best is None or not counts:",
        "    if plans.best is None:",
        (f"{PHASES}::test_an_early_stop_comes_in_the_last_phase[lt_sft]",),
    ),
    # One trains alone, and the clocks of the others go on.
    Fault(
        "adalora behind a prompt prunes by scores of zero",
        *_CLOCKS_OF_THEIR_OWN,
        (f"{TURNS}::test_adalora_behind_a_prompt_chooses_by_what_it_saw",),
    ),
    Fault(
        "loca's search ends while another objective's heads train alone",
        *_CLOCKS_OF_THEIR_OWN,
        (f"{TURNS}::test_locations_are_searched_for_behind_the_phases_of_others[tune0-caft]",),
    ),
    Fault(
        "loca's search ends while a prompt trains alone",
        *_CLOCKS_OF_THEIR_OWN,
        (f"{TURNS}::test_locations_are_searched_for_behind_the_phases_of_others[tune1-cross_entropy]",),
    ),
    Fault(
        "lofit selects among scales that could not move yet",
        *_CLOCKS_OF_THEIR_OWN,
        (f"{TURNS}::test_heads_are_selected_behind_a_prompt",),
    ),
    Fault(
        "lt_sft stops in mid-run, since nothing moved while a prompt trained alone",
        *_CLOCKS_OF_THEIR_OWN,
        (f"{TURNS}::test_a_ticket_is_drawn_behind_a_prompt",),
        raises="nothing moved",
    ),
    # The first learning rate that a technique is told of.
    Fault(
        "a technique's first learning rate is that of a run without phases",
        "training/loop.py",
        "        return self.at(self.turns.first(slot, self.steps), 0.0)",
        "        return self.at(0, 0.0)",
        (f"{TURNS}::test_the_schedule_begins_again_where_the_phase_does_and_techniques_are_told_of_their_first_rate",),
    ),
    Fault(
        "what begins with a step of its own takes that of the run",
        "training/build.py",
        "        return RunServices(owner, slot, now if first is None else first(slot), calibration)",
        "        return RunServices(owner, slot, now, calibration)",
        (f"{TURNS}::test_what_begins_with_its_first_step_gets_the_rate_of_that_step",),
    ),
    Fault(
        "a plan tells all techniques the learning rate of the run's first step",
        "planning/attach.py",
        "        first=clock.first,\n",
        "",
        (f"{TURNS}::test_a_plan_tells_a_technique_the_rate_of_its_own_first_step",),
    ),
    Fault(
        "a plan's clock knows nothing of phases",
        "planning/attach.py",
        ", turns=turns_of(values_of(chosen)))",
        ")",
        (f"{TURNS}::test_a_plan_tells_a_technique_the_rate_of_its_own_first_step",),
    ),
    # Steps without targets.
    Fault(
        "spiel's exchange is tied to a step that had no targets, and never comes",
        "training/engine.py",
        "            said = self._refresh(now)\n",
        "            said: list[str] = []\n",
        (f"{TURNS}::test_entries_are_exchanged_behind_a_step_without_targets",),
    ),
    Fault(
        "lift's selection is tied to a step that had no targets, and never comes",
        "training/engine.py",
        "            said = self._refresh(now)\n",
        "            said: list[str] = []\n",
        (f"{TURNS}::test_a_selection_is_made_anew_behind_a_step_without_targets",),
    ),
    Fault(
        "sstoken's history is not moved on behind a step that had no targets",
        "methods/token_weight/sstoken.py",
        '        if times != state["remembered"]:',
        "        if services.now.after().step % every == 0:",
        (f"{TURNS}::test_callbacks_make_up_for_a_step_without_targets[sstoken]",),
    ),
    Fault(
        "convergence_balance does not look behind a step that had no targets",
        "methods/token_weight/convergence_balance.py",
        '        if times == state["looked"]:',
        "        if services.now.after().step % every:",
        (f"{TURNS}::test_callbacks_make_up_for_a_step_without_targets[convergence_balance]",),
    ),
    Fault(
        "adalora does not prune behind a step that had no targets",
        "methods/weight_delta/adalora.py",
        '        due = step // every != state.get("pruned", 0)',
        "        due = step % every == 0",
        (f"{TURNS}::test_callbacks_make_up_for_a_step_without_targets[adalora]",),
    ),
)
