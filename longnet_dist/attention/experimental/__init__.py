"""Sparser kinds of dilated attention, which may change or go. They save no time, because all scores are computed."""
