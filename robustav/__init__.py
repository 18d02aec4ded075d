"""robustav: how easily can an audio, visual or audio-visual classifier be fooled, and can that number be trusted?"""

__version__ = "0.1.0"
