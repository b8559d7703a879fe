"""Drawn data sets with exact answers: charts, tables, documents, diagrams, code, clocks and scenes."""
