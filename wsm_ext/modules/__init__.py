"""What is found in a module, and what stands in it: units, sources, placeholders."""
