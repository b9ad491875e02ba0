"""The console: a web page for operators. A process of its own, which reads the database."""
