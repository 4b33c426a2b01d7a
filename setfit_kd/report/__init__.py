"""Report of a run: summary, HTML page, Markdown and model cards."""
