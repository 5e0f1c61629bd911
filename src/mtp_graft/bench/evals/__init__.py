"""Quality benchmarks: a served model's answers, judged by programs."""
