"""Tables, curves, pictures and pages."""
