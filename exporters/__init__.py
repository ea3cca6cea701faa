"""How the chosen codes are written down, and the proof that the runtime reads them: one file or folder per runtime."""
