"""Where compressed pages are stored and computed on: one folder for each kind of device."""
