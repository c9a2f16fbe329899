"""Speed, shown by scripts: one question each, contenders interleaved in one run, medians and ratios."""
