"""One fault of the package: a line of its source that is another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "nflows_iresnet"


class LostFaultError(ValueError):
    """The source that a fault replaces is not there any more, or not once."""


@dataclass(frozen=True)
class Fault:
    """A text of a file that is replaced, and who sees it.

    Attributes:
        name: what is wrong then, in a few words.
        file: of the package, from its folder.
        source: a text that the file holds once.
        faulty: what stands there instead.
        tests: who should see it, the likeliest first, one space between: files without `test_` and
            `.py`, or tests, `logdet::test_standard_errors_are_right`.
    """

    name: str
    file: str
    source: str
    faulty: str
    tests: str

    @property
    def room(self) -> str:
        return self.file.partition("/")[0].removesuffix(".py")

    @property
    def test_files(self) -> list[str]:
        """The tests, as pytest takes them."""
        split = [each.partition("::") for each in self.tests.split()]
        return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in split]

    def planted_in(self, text: str) -> str:
        """Return the text of the file with the fault.

        Raises:
            LostFaultError: if the source is not found once.
        """
        count = text.count(self.source)
        if count != 1:
            raise LostFaultError(
                f"{self.name!r}: {self.file} holds {self.source!r} {count} times instead of once; "
                "find the line that does this work today, or another text that is unique"
            )
        return text.replace(self.source, self.faulty)

    def path(self, root: Path) -> Path:
        return root / PACKAGE / self.file
