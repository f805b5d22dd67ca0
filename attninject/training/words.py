"""The words for parts of a model that `freeze` takes; apart from `freezing`, since flags show them without torch."""

WORDS = ("backbone", "head", "injected")
