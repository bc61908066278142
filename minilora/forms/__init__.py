"""The forms of a report: what text, JSON, Markdown and HTML take, whatever is reported."""
