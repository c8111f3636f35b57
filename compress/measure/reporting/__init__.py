"""Reports: what they hold, their table, their pictures and their page."""
