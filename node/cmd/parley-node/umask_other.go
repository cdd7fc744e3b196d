//go:build !unix

package main

// private does nothing: the data directory's access rules apply to what is created in it.
func private() {}
