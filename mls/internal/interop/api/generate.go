// Package api is the generated gRPC code of the interface that the MLS working group's interoperability harness gives
// its clients.
package api

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate
