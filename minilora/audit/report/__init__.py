"""An audit's report as text, JSON, SARIF, JUnit, Markdown and HTML."""
