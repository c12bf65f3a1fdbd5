"""Other tools' dictionary layouts."""
