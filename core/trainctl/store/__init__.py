"""What a run leaves behind and how it is read: journal, metric history, audit log, and the run as told by them."""
