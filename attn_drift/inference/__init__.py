"""Running a frozen model again and again, within memory."""
