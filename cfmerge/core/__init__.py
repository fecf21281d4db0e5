"""The framework that methods are written in.

part         methods, transforms, and their needs
chain        transforms and one method as one method
call         the call that made a part: a pytree whose leaves are its numbers
numbers      forms of a number: gradients over depth, values by name and by expert
survey       looks at the whole model before the merge
deltas       methods that are one function of all deltas
registry     names of methods and transforms; `register`
expressions  methods as text, and back
several      many methods as one, for sweeps
random       keys that depend on seed, tensor and expert alone
checks       checks of a factory's arguments
"""
