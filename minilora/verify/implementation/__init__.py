"""The implementation under test: its methods, the guard around it, how it is loaded."""
