"""Which files are read, and files as other programs write them."""

from __future__ import annotations

from tests.planted.fault import Fault

FILES = "unit/test_rows_files.py"

FAULTS = (
    Fault(
        "a folder's files for testing are learned",
        "rows/files.py",
        '    if purpose == "train":\n        reasons',
        '    if purpose == "none":\n        reasons',
        (f"{FILES}::test_a_folder_trains_on_no_test_split_and_on_no_stray_text",),
    ),
    Fault(
        "texts about the rows are learned",
        "rows/files.py",
        '            return "it is about the rows"',
        '            return ""',
        (f"{FILES}::test_a_folder_trains_on_no_test_split_and_on_no_stray_text",),
    ),
    Fault(
        "stray texts beside rows are learned",
        "rows/files.py",
        '            return "it is a text beside rows"',
        '            return ""',
        (f"{FILES}::test_a_folder_trains_on_no_test_split_and_on_no_stray_text",),
    ),
    Fault(
        "a folder to evaluate on is measured with its training rows",
        "rows/files.py",
        '    if purpose == "evaluate" and held_out and',
        '    if purpose == "none" and held_out and',
        (f"{FILES}::test_files_for_testing_are_what_evaluation_wants",),
    ),
    Fault(
        "nothing says which files of a folder a run learns",
        "planning/plan.py",
        '        lines += _listed("files", list(self.files))\n',
        "",
        (f"{FILES}::test_the_plan_lists_the_files[False]",),
    ),
    Fault(
        "nothing says which files of a folder a run leaves out",
        "planning/plan.py",
        '        lines += _listed("left out", [f"{one.file}: {one.why}" for one in self.left_out])\n',
        "",
        (f"{FILES}::test_the_plan_lists_the_files[False]",),
    ),
    Fault(
        "a saved data set is refused for the file that describes it",
        "rows/files.py",
        "    if file.name not in _DESCRIBE:",
        "    if file.name not in _DESCRIBE or file.name != 'none':",
        (f"{FILES}::test_data_sets_that_were_saved_or_cloned",),
        raises="holds neither",
    ),
    Fault(
        "a file that only says where rows are is called broken",
        "rows/files.py",
        "    if _begins(path, _POINTER):",
        "    if _begins(path, _POINTER + b'!'):",
        (f"{FILES}::test_data_sets_that_were_saved_or_cloned",),
    ),
    Fault(
        "a gzipped file without the ending of one is called broken JSON",
        "rows/files.py",
        '    if path.suffix.lower() == ".gz" or _begins(path, _GZIP):',
        '    if path.suffix.lower() == ".gz":',
        (f"{FILES}::test_what_is_packed_is_known_by_its_bytes",),
        raises="broken JSON",
    ),
    Fault(
        "half a character that JSON escapes is taken for the encoding of the file",
        "rows/read.py",
        "    return _ESCAPED_SURROGATE.search(raw) is not None and _is_utf8(raw)",
        "    return False",
        (f"{FILES}::test_half_a_character_is_not_the_encoding_of_the_file[jsonl]",),
    ),
    Fault(
        "quotes that do not fit are told without their line",
        "rows/separated.py",
        '    return LuthierError(f"the file cannot be read: {what}", where=f"{path}:{ends}", fix=fix)',
        '    return LuthierError(f"the file cannot be read: {what}", where=str(path), fix=fix)',
        (f"{FILES}::test_errors_in_tables_name_the_line",),
    ),
    Fault(
        "spaces in a header are part of its names",
        "rows/separated.py",
        "        header = [name.strip() for name in names]",
        "        header = list(names)",
        (f"{FILES}::test_tables_as_others_write_them",),
        raises="lacks `prompt`",
    ),
)
