"""The engine: one loop that carries out the work that planning has made, for files and for trees in memory.

    for job in work.jobs that keep the base: sink.write(base's tensor)

    for method that surveys the model:                     # its look is a generator of measures
        for measure in look:
            for unit in units_of(work): totals += through(unit, Measuring)
        found = what the look returns

    for unit in units_of(work), if not journal.done(unit): # the pass that writes
        for attempt in ways(unit, found):                  # low-rank form, float32, float64 where it is needed
            outcome = through(unit, Additive or Together)
        account.add(reports), sink.write(outcome), journal.mark(unit, reports)

    through(unit, steps):
        state = steps.start(base's share)
        for expert: state = steps.update(state, expert's share)
        return steps.finish(state)

Of several processes each does its own units, and `totals` are joined in the order of all units.
A few threads work on units at once, and results are taken in the units' order. `accumulate` is the last pass with the
steps `Unsolved`, which return the statistics.

    run        what is asked of the loop
    loop       the loop, its threads
    looks      surveys of the model on the loop
    orders     order statistics of a model in pieces
    within     looks within a tensor
    units      the pieces of work
    cutting    jobs cut into units
    passes     the steps of each kind of pass
    steps      the functions that are compiled
    joint      that of adapters, which are merged in the joint basis of their factors
    compiling  programs kept on disk between runs, and compiled quickly where they run briefly
    inputs     all that comes with their arrays
    placement  which devices do a unit; units joined to fill a mesh
    processes  which process does a unit; what processes tell each other
    spread     how a unit lies on devices
    precision  the decisions that are made while running
    low_rank   dense deltas of low rank, recognised
    sampling   some entries of every matrix: experts of another base, and twins
    surveys    findings, and the methods that asked for them
    checks     checks of values
    account    reports and notes
    journal    what is done, by ranges of the output
    writing    results written while others are computed
"""
