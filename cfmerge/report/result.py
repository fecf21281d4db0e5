"""The result of a merge."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.formats.peft import STEM
from cfmerge.planning.resolved import Resolved
from cfmerge.report.card import versions


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

        >>> result = cfmerge.merge("base", ["math", "code"], output="merged")
        >>> result.output.name, result.warnings, len(result.digests)
        ('merged', (), 3)
        >>> "ridge_ratio" in result.reports["layer.weight"]
        True

    Attributes:
        output: the directory, or the file, of the merged model; None where a sink took it.
        plan: the plan that was carried out.
        warnings: reasons not to use the model as a whole.
        notes: remarks on single tensors, experts and files, from the plan and from the methods.
        reports: `{tensor: {name: value}}`, the method's report on each tensor (ACE: gate, ridge ratio, ...).
        digests: `{file: SHA-256}` of every input file.
        seconds: wall time.
        resumed: what was found of an earlier run of this merge, and what has become of it.
    """

    output: Path | None
    plan: Resolved
    notes: tuple[str, ...]
    reports: Mapping[str, Mapping[str, float]]
    digests: Mapping[Path, str]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's tensors; of an adapter those of its file."""
        if self.output is None or self.plan.recipe.adapter_out is None:
            return self.plan.bytes_to_write
        return (self.output / f"{STEM}.safetensors").stat().st_size

    def summary(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        return {
            "output": str(self.output),
            "method": self.plan.method.name,
            "experts": [spec.name for spec in self.plan.expert_specs],
            "counts": [
                {"kind": kind, "what": what, "tensors": count}
                for (kind, what), count in sorted(self.plan.counts().items())
            ],
            "bytes_read": self.plan.bytes_to_read,
            "bytes_written": self.bytes_written,
            "sha256": {str(file): digest for file, digest in self.digests.items()},
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "resumed": list(self.resumed),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
        }
