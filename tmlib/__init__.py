"""tmlib: the library behind the TalkingMachines workbook. One concept a file; the notebooks tell the story."""

__version__ = "0.1.0"
