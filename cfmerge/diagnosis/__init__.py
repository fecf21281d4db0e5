"""What experts tell of themselves: numbers of every tensor, findings in plain words, and which method they ask for.

    result.py       the data: `Diagnosis`, `Measured`, `Finding`, `Recommendation`
    ranks.py        the rank of a delta, above the rounding of its dtype
    measuring.py    the numbers of one tensor, from the base and all deltas at once
    collecting.py   these numbers, as a pass over a model finds them, as `Measured`
    reading.py      numbers of the whole model that findings rest on
    of_experts.py, of_ranks.py, of_tensors.py, words.py
                    findings, each with its threshold
    findings.py     all of them, gravest first
    choice.py       the rule of `method: auto`
    recommending.py the recommendation, by that rule

All of it is pure: arrays in, arrays and words out. `cfmerge.diagnose` (products/diagnose.py) reads the files.
"""

from cfmerge.diagnosis.result import Diagnosis as Diagnosis
from cfmerge.diagnosis.result import Finding as Finding
from cfmerge.diagnosis.result import Measured as Measured
from cfmerge.diagnosis.result import Recommendation as Recommendation
