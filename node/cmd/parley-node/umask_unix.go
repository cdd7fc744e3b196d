//go:build unix

package main

import "syscall"

// private makes what the program creates the operator's only, the store's files and the admin socket from its first
// moment, whatever the mode of the data directory is.
func private() { syscall.Umask(0o077) }
