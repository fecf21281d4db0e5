"""`cfmerge time run`: a published setting of merging over time, on checkpoints that are there."""

from pathlib import Path
from typing import Annotated, Any

from cfmerge.cli import options as o
from cfmerge.cli import show

RUN = "cfmerge time run STORE --setting fomo-in-flux --base BASE --experts DIR -o SERVED"


def run(
    store: o.StorePath,
    *,
    setting: Annotated[
        str, o.option("--setting", metavar="NAME", panel=o.WHAT, help="A published one, or a file of yours.")
    ],
    base: Annotated[str, o.option("--base", metavar="PATH", panel=o.WHAT, help="The model that all began from.")],
    experts: Annotated[
        Path, o.option("--experts", metavar="DIR", panel=o.WHAT, help="Checkpoints by the setting's tasks.")
    ],
    stream: Annotated[
        str | None, o.option("--stream", metavar="NAME", panel=o.WHAT, help="The order. Default: the setting's.")
    ] = None,
    scores: Annotated[
        Path | None, o.option("--scores", metavar="PATH", panel=o.WHAT, help="JSON {step: {name: score}}, or CSV.")
    ] = None,
    protocol: Annotated[
        str | None, o.option("--protocol", metavar="NAME", panel=o.HOW, help="Default: the setting's first.")
    ] = None,
    init_rule: Annotated[
        str | None, o.option("--init", metavar="RULE", panel=o.HOW, help="A rule of yours, with --deploy.")
    ] = None,
    deploy_rule: Annotated[
        str | None, o.option("--deploy", metavar="RULE", panel=o.HOW, help="A rule of yours, with --init.")
    ] = None,
    output: o.Output,
    copy: Annotated[bool, o.option("--copy", panel=o.WHERE, help="Copy the experts into the store.")] = False,
    memory: o.Memory = None,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Run a published setting on checkpoints that are there: store, deploy, tell what to evaluate."""
    from cfmerge.temporal import run_setting
    from cfmerge.temporal.setting_runs import read_scores

    table = read_scores(scores) if scores is not None else None
    rules: dict[str, Any] = {"protocol": protocol, "init": init_rule, "deploy": deploy_rule}
    with show.pulse(json, quiet) as progress:
        done = run_setting(
            setting, store, base, experts, output, stream=stream, scores=table, link=not copy, memory=memory,
            devices=devices, progress=progress, **rules,
        )  # fmt: skip
    if json or quiet:
        served = {str(step): str(path) for step, path in done.served.items()}
        show.done(json, quiet, "", served=served, waiting=list(done.waiting), unscored=done.unscored)
        return
    for step, path in done.served.items():
        show.line(f"step {step}: {path}{'' if step not in done.unscored else '  (to be evaluated)'}")
    if done.waiting:
        show.line(f"waiting for the experts {', '.join(done.waiting)}")
    show.line(f"cfmerge time report {store} shows the metrics; --scores takes the table of scores")
