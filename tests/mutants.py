"""Breaks each promise on purpose, in a copy of the tree, and shows which test notices: `make mutants`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One promise broken.

    Attributes:
        what: What is broken.
        file: Where, relative to the root.
        old: Text that is there exactly once.
        new: What takes its place.
        test: The test that has to fail.
    """

    what: str
    file: str
    old: str
    new: str
    test: str


ONCE = "tests/shared/test_once.py"
MUTANTS = (
    Mutant(
        "intent not written before the request",
        "clients/once.py",
        "        intent, origin = intent.from_now(asked), Origin.SENT\n        store.write(intent)\n",
        "        intent, origin = intent.from_now(asked), Origin.SENT\n",
        f"{ONCE}::test_first_call_writes_the_intent_before_it_sends",
    ),
    Mutant(
        "look before the launch skipped",
        "clients/once.py",
        "        found = _look(launch, intent, circumstances)\n",
        "        found = None\n",
        f"{ONCE}::test_object_that_carries_the_token_is_adopted_without_a_record",
    ),
    Mutant(
        "settle window of 0 s",
        "clients/once.py",
        "        seconds = min(max(left, 0.0), launch.settle_seconds)\n",
        "        seconds = 0.0 * left\n",
        f"{ONCE}::test_killed_in_flight_and_started_again_at_once_makes_one",
    ),
    Mutant(
        "lock between processes off",
        "clients/files.py",
        "            holder.acquire()\n",
        "            pass\n",
        f"{ONCE}::test_lock_keeps_a_second_process_out",
    ),
    Mutant(
        "5xx taken for a refusal",
        "clients/once.py",
        "400 <= (error.status or 0) < 500",
        "400 <= (error.status or 0)",
        f"{ONCE}::test_one_list_says_what_leaves_a_doubt",
    ),
    Mutant(
        "answer in another language taken for a refusal",
        "clients/once.py",
        "        refused = error.spoken and 400",
        "        refused = 400",
        f"{ONCE}::test_lost_answer_of_a_launch_that_took_effect_is_found",
    ),
    Mutant(
        "size of a download not checked",
        "clients/vip/download.py",
        "    if received != (output.size if output.size is not None else expected or received):\n",
        "    if False:\n",
        "tests/vip/test_vip_answers.py::test_file_of_another_size_than_told_is_not_taken",
    ),
    Mutant(
        "short body accepted",
        "clients/http.py",
        "        pieces = response.iter_content(_CHUNK_BYTES)\n",
        "        response.raw.enforce_content_length = False\n        pieces = response.iter_content(_CHUNK_BYTES)\n",
        "tests/shared/test_http.py::test_short_body_is_an_error_and_not_a_short_file",
    ),
    Mutant(
        "public keys of members not checked",
        "clients/vantage6/preflight.py",
        "            PublicKey.from_text(organization.public_key)\n        except InvalidKey as error:\n",
        "            pass\n        except InvalidKey as error:\n",
        "tests/vantage6/test_vantage6_tasks.py"
        "::test_a_member_whose_public_key_cannot_be_read_is_named_before_anything_is_sent",
    ),
    Mutant(
        "another public key of a member taken for the known one",
        "clients/vantage6/known_keys.py",
        "            elif vouched is None and changed:\n",
        "            elif False:\n",
        "tests/vantage6/test_vantage6_known_keys.py::test_a_key_that_has_changed_is_refused_until_it_is_confirmed",
    ),
    Mutant(
        "damaged record of public keys taken for first use",
        "clients/vantage6/known_keys.py",
        "        if record is None or",
        "        if record is None:\n            return []\n        if record is None or",
        "tests/vantage6/test_vantage6_known_keys.py::test_a_damaged_record_is_no_first_use",
    ),
    Mutant(
        "every error transient",
        "clients/errors.py",
        "    return isinstance(error, BiomedError) and error.transient\n",
        "    return True\n",
        "tests/shared/test_errors.py::test_what_can_be_tried_again",
    ),
    Mutant(
        "no error transient",
        "clients/errors.py",
        "    return isinstance(error, BiomedError) and error.transient\n",
        "    return False\n",
        "tests/shared/test_errors.py::test_what_can_be_tried_again",
    ),
    Mutant(
        "ONCE without a cache",
        "tasks/policies.py",
        '    "cache_policy": _WITHOUT_CREDENTIALS + RootRun(),\n',
        '    "cache_policy": NO_CACHE,\n',
        "tests/flows/test_place_of_call.py::test_retry_of_the_root_takes_what_was_finished_from_the_cache",
    ),
    Mutant(
        "lease left closed after a doubt",
        "clients/once.py",
        "            found, origin = _settle(launch, intent, error, circumstances), Origin.SETTLED\n",
        "            try:\n"
        "                found, origin = _settle(launch, intent, error, circumstances), Origin.SETTLED\n"
        "            except BiomedError as doubt:\n                return _Refused(doubt)\n",
        f"{ONCE}::test_doubt_leaves_the_lease_open",
    ),
    Mutant(
        "answer of another shape believed",
        "clients/rest.py",
        '        return cast("T", _adapter(cast("Any", shape)).validate_json(text))\n',
        '        return cast("T", _decoded(text))\n',
        "tests/shared/test_rest.py::test_success_of_another_shape_is_unexpected",
    ),
)


def main() -> int:
    """Run every mutant against its test; the exit status is the number of those that live."""
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied(Path(folder))
        tests = sorted({mutant.test for mutant in MUTANTS})
        if not _passes(copy, *tests):
            print("The tests that are to notice the mutants fail without any. Mend them first.")
            return 1
        alive = [mutant for mutant in MUTANTS if _lives(copy, mutant)]
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants killed")
    return len(alive)


def _lives(copy: Path, mutant: Mutant) -> bool:
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.what}: {mutant.file} has the text to change {text.count(mutant.old)} times, not once."
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    begun = time.monotonic()
    try:
        lives = _passes(copy, mutant.test)
    finally:
        path.write_text(text, encoding="utf-8")
    print(
        f"{'LIVES ' if lives else 'killed'} {mutant.what}: {mutant.test} ({time.monotonic() - begun:.0f} s)", flush=True
    )
    return lives


def _passes(copy: Path, *tests: str) -> bool:
    """Whether tests pass on the copy, whose modules come before the installed ones by the links for type checkers."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy / "typings"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 1}:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def _copied(folder: Path) -> Path:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


if __name__ == "__main__":
    sys.exit(main())
