"""Audits of files and servers: is this really the base with the adapter?"""
