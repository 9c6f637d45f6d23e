"""kvfold inside serving engines."""
