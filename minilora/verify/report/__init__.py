"""Reports as text, Markdown, JUnit, JSON and HTML."""
