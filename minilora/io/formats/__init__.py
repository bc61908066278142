"""The doors: models and adapters in files, under the names and layouts that other libraries use."""
