"""Integrations with other frameworks. Only the module or folder of a framework imports it."""
