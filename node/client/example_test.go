package client_test

import (
	"context"
	"fmt"
	"log"

	"github.com/parley-mls/parley/authority"
	"github.com/parley-mls/parley/node/client"
)

// Alice makes a device of hers, opens a room with Bob of another organisation, and reads what is written.
func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	invitation, err := authority.ParseInvitation("parley:...") // from alpha.example's administrator
	if err != nil {
		log.Fatal(err)
	}
	alice, err := client.Enrol(ctx, client.Options{Dir: "alice"}, invitation, "alice-laptop")
	if err != nil {
		log.Fatal(err)
	}
	go alice.Run(ctx)

	bob, err := alice.Find(ctx, "bob@beta.example")
	if err != nil {
		log.Fatal(err)
	}
	room, err := alice.CreateRoom(ctx, "lunch")
	if err != nil {
		log.Fatal(err)
	}
	if err := room.Add(ctx, bob); err != nil {
		log.Fatal(err)
	}
	if _, err := room.Send(ctx, []byte("noon at the usual place?")); err != nil {
		log.Fatal(err)
	}
	for event := range alice.Events() {
		if m, ok := event.(client.Message); ok {
			fmt.Printf("%s: %s\n", m.User, m.Data)
		}
	}
}
