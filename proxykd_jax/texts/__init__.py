"""Rows as text: from files of a teacher's answers to selected, split and tokenised rows."""
