"""Integrations with other frameworks: one module or folder for each, which alone imports that framework."""
