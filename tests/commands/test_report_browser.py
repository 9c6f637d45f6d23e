"""The report of `kvfold compare`, looked at in headless Chromium: what is in its page after loading, sorting and filtering."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvfold.bench.plot import plot_rates
from kvfold.bench.report import Column, Line, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --window-size=1280,900 --enable-logging=stderr"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium to look with: apt-get install chromium")

COLUMNS = [Column("bits", "bits", ".2f", "bits an element"), Column("kl", "KL", ".4f", "nats a token")]
LINES = [  # bits and KL sort otherwise as text than as numbers
    Line("rvq:bits=9", "rvq", [9, 2e-5], "", {"stages": 36, "rope": "pre"}, ["kvfold calibrate m"], "Measured today."),
    Line("rvq:bits=10", "rvq", [10, 1e-5], "", {"stages": 40, "rope": "post"}, ["kvfold calibrate m"], ""),
    Line("odd:x=<i>", "<odd> & 'rest'", [], 'no <script>alert(1)</script>\n"memory"', {"x": "<i>"}, ["kvfold <c>"], ""),
    Line("turboquant", "turboquant", [4, float("nan")], "", {"bits": 4}, ["kvfold calibrate m"], ""),
    Line("identity", "identity", [32, 0.5], "", {"dtype": "float32"}, ["kvfold calibrate m"], ""),
]


class Seen(NamedTuple):
    """The page after its script ran, and what the browser wrote to its console."""

    page: str
    console: list[str]

    @property
    def names(self) -> list[str]:
        """Of the rows that are shown, in order."""
        bodies = re.findall(r"<tbody([^>]*)>(.*?)</tbody>", self.page, re.DOTALL)
        shown = [body for attributes, body in bodies if "hidden" not in attributes]
        return [html.unescape(name) for body in shown for name in re.findall(r"<summary>(.*?)</summary>", body)]

    @property
    def order(self) -> list[str]:
        """How each column is sorted."""
        return re.findall(r'<th scope="col"[^>]* aria-sort="(\w+)"', self.page)

    @property
    def told(self) -> str:
        """What the test's own script had to say."""
        return html.unescape(re.findall(r"<title>(.*?)</title>", self.page)[0])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    plot_rates({"rvq": [(9, 1.1, 0.1), (10, 1.05, 0.05)]}, "picture", folder / "p.png")
    file = folder / "report.html"
    write_report(file, "Codecs", "a <tiny> model", COLUMNS, LINES, folder / "p.png", "kvfold compare m", {"machine": "<mine>"})
    return file


@pytest.fixture
def look(report: Path, tmp_path: Path) -> Callable[..., Seen]:
    def look(fragment: str = "", script: str = "", *options: str, own_script: bool = True) -> Seen:
        """The report at `#fragment`, after `script` ran in it; what that puts into `document.title` is told."""
        file, page = tmp_path / "report.html", report.read_text()
        if not own_script:
            page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
        file.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
        address = file.as_uri() + (fragment and f"#{fragment}")
        command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return Seen(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])

    return look


def test_the_page_loads_without_a_complaint_and_shows_everything(look: Callable[..., Seen]) -> None:
    script = "const i = document.images[0], e = document.documentElement; document.title = ["
    script += "i.naturalWidth > 900, i.clientWidth > 900, e.scrollWidth <= e.clientWidth, document.forms[0].offsetHeight > 20]"
    seen = look("", script)
    assert seen.console == []
    assert seen.names == [line.name for line in LINES]
    assert seen.order == ["none"] * 3
    assert seen.told == "true,true,true,true"  # the picture is there; nothing sticks out
    assert "5 of 5 rows" in seen.page
    assert 'no &lt;script&gt;alert(1)&lt;/script&gt;\n"memory"' in seen.page  # and no alert, which would be a complaint


@pytest.mark.parametrize(
    ("fragment", "names", "order"),
    [
        ("sort=bits", ["turboquant", "rvq:bits=9", "rvq:bits=10", "identity", "odd:x=<i>"], "ascending"),
        ("sort=-bits", ["identity", "rvq:bits=10", "rvq:bits=9", "turboquant", "odd:x=<i>"], "descending"),
        ("sort=codec", ["identity", "odd:x=<i>", "rvq:bits=9", "rvq:bits=10", "turboquant"], "ascending"),
        ("sort=kl", ["rvq:bits=10", "rvq:bits=9", "identity", "odd:x=<i>", "turboquant"], "ascending"),
        ("sort=-kl&method=rvq&method=identity", ["identity", "rvq:bits=9", "rvq:bits=10"], "descending"),
        ("method=%3Codd%3E+%26+%27rest%27", ["odd:x=<i>"], "none"),
        ("text=rope%3Dpre", ["rvq:bits=9"], "none"),
        ("text=RVQ+post", ["rvq:bits=10"], "none"),
        ("text=memory", ["odd:x=<i>"], "none"),
        ("text=rvq&method=identity", [], "none"),
        ("sort=nonsense&method=nonsense&text=", [line.name for line in LINES], "none"),
    ],
)
def test_the_address_sorts_and_filters(look: Callable[..., Seen], fragment: str, names: list[str], order: str) -> None:
    seen = look(fragment)
    assert seen.names == names
    assert f"{len(names)} of 5 rows" in seen.page
    column = {"codec": 0, "bits": 1, "kl": 2}.get(re.sub(r"sort=-?(\w*).*", r"\1", fragment))
    assert seen.order == [order if i == column else "none" for i in range(3)]
    assert seen.console == []


def test_heads_and_form_sort_and_filter_and_tell_the_address(look: Callable[..., Seen]) -> None:
    click = "document.querySelectorAll('thead button')[1].click();"
    tell = "document.title = location.hash;"
    seen = look("", click + tell)
    assert (seen.names[0], seen.told, seen.order[1]) == ("turboquant", "#sort=bits", "ascending")
    seen = look("", click + click + "document.querySelectorAll('[name=method]')[0].click();" + tell)
    assert (seen.names, seen.told) == (["rvq:bits=10", "rvq:bits=9"], "#sort=-bits&method=rvq")
    type_in = "const t = document.forms[0].text; t.value = 'kvfold <c>'; t.dispatchEvent(new Event('input', {bubbles: true}));"
    seen = look("sort=bits", type_in + tell)
    assert (seen.names, seen.told) == (["odd:x=<i>"], "#sort=bits&text=kvfold+%3Cc%3E")
    assert seen.console == []


def test_a_changed_address_changes_the_page(look: Callable[..., Seen]) -> None:
    change = "location.hash = 'method=identity'; dispatchEvent(new HashChangeEvent('hashchange'));"
    assert look("method=rvq", change).names == ["identity"]


def test_settings_and_commands_show_when_a_name_is_opened(look: Callable[..., Seen]) -> None:
    heights = "document.title = [...document.querySelectorAll('.more')].map(row => row.offsetHeight > 20)"
    assert look("", heights).told == "false,false,false,false,false"
    open_second = "document.querySelectorAll('summary')[1].click();"
    assert look("", open_second + heights).told == "false,true,false,false,false"


@pytest.mark.parametrize(("scheme", "lighter"), [(0, "text"), (1, "page")])
def test_light_and_dark(look: Callable[..., Seen], scheme: int, lighter: str) -> None:
    tell = "const s = getComputedStyle(document.body); document.title = s.color + s.backgroundColor"
    numbers = list(map(int, re.findall(r"\d+", look("", tell, f"--blink-settings=preferredColorScheme={scheme}").told)))
    assert ("text" if sum(numbers[:3]) > sum(numbers[3:]) else "page") == lighter
    assert abs(sum(numbers[:3]) - sum(numbers[3:])) > 400  # of 765: contrast


def test_nothing_outside_the_file_can_be_loaded(look: Callable[..., Seen], report: Path) -> None:
    seen = look("", "const i = new Image(); i.src = 'file:///x.png'; document.body.append(i)")
    assert "Content Security Policy" in seen.console[0]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", report.read_text())


def test_it_can_be_read_without_its_script(look: Callable[..., Seen]) -> None:
    open_first = "document.querySelector('summary').click();"
    tell = "document.title = [document.querySelector('.more').offsetHeight > 20, document.forms[0].offsetHeight]"
    seen = look("sort=bits", open_first + tell, own_script=False)
    assert seen.names == [line.name for line in LINES]
    assert seen.told == "true,0"  # names open; no controls that would do nothing
