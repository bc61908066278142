"""Audits of files and servers: is this really the base with the adapter?

Each audit is a function that returns a `Report`, as ``minilora audit NAME`` prints it.
"""

from minilora.audit.adapter import adapter as adapter
from minilora.audit.converted import converted as converted
from minilora.audit.find import find as find
from minilora.audit.merged import merged as merged
from minilora.audit.result import Entry as Entry
from minilora.audit.result import Report as Report
from minilora.audit.served import served as served

# A function has the name of the module that it is in: here the name is the function's.
__all__ = ["Entry", "Report", "adapter", "converted", "find", "merged", "served"]
