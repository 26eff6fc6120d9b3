"""No bytes in a file of any format crash, hang or fill the memory, or run anything: it is read, or refused by name."""

import hashlib
import re
from pathlib import Path

import pytest
from fuzz.child import Child
from fuzz.formats import FORMATS, pack, unpack
from helpers import BACKEND
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CRASHES = Path(__file__).parent / "crashes"

if BACKEND != "tensorflow":
    pytest.skip("reading files does not depend on the backend", allow_module_level=True)


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    process = Child(tmp_path_factory.mktemp("child"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Returns the valid files of a format, and their paths."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            (folder / "made").mkdir()
            files = FORMATS[name].make(folder / "made")
            made[name] = files, [FORMATS[name].write(each, folder / str(n)) for n, each in enumerate(files)]
        return made[name]

    return of


class _Case:
    """A damaged file. Hypothesis prints what it has drawn, and this is short."""

    def __init__(self, files):
        self.files = files


def _signature(problem: str) -> str:
    """Returns what the same fault has in common: the exception, and the line of this package that raised it."""
    first, *frames = problem.splitlines()
    own = [line for line in frames if not line.startswith("  /")]
    return re.sub(r"\d+", "", ": ".join(first.split(":")[: 2 if first.startswith("a ") else 1])) + "".join(own[-1:])


@pytest.mark.parametrize("cases", [50, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused(name, cases, child, valid, tmp_path):
    format, (files, paths) = FORMATS[name], valid(name)
    found: dict[str, bytes] = {}
    count = 0

    @settings(
        max_examples=max(cases // format.share, 3),
        derandomize=cases == 50,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of([format.damage(each) for each in files]).map(_Case))
    def run(drawn):
        nonlocal count
        count, case = count + 1, drawn.files
        problem = child.problem(format.reader, format.write(case, tmp_path / "case"), paths)
        if problem:
            data, place = pack(case), _signature(problem)
            if len(data) < len(found.get(place, (problem, data + b" "))[1]):
                found[place] = problem, data

    run()
    CRASHES.mkdir(exist_ok=True)
    for _, data in found.values():
        (CRASHES / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    assert not found, "\n\n".join(problem for problem, _ in found.values())


@pytest.mark.parametrize("crash", sorted(path.name for path in CRASHES.glob("*-*")))
def test_what_once_crashed_is_read_or_refused(crash, child, valid, tmp_path):
    format, (files, paths) = FORMATS[crash.rpartition("-")[0]], valid(crash.rpartition("-")[0])
    case = unpack((CRASHES / crash).read_bytes(), isinstance(files[0], dict))
    problem = child.problem(format.reader, format.write(case, tmp_path / "case"), paths)
    assert not problem, problem
