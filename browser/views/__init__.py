"""One module a view; each has `show(page)`."""
