"""What a step costs here and elsewhere: time, memory and arithmetic, of the same model and batch.

Each side runs in a process of its own and does one step when it is told to, in turn with the other:
what else the machine does meets both. What is compared is the ratio of neighbours, and its median.
"""
