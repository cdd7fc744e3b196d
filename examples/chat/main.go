// Command chat is a small messenger on the SDK. Each command connects, catches up, acts and exits; "chat tail" without
// -n follows what comes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/parley-mls/parley/node/client"
)

const usage = `chat [-dir DIRECTORY] [-timeout 30s] [-tcp] [-v] COMMAND

  enrol INVITATION DEVICE     make this a device of the invited user; DEVICE is its name, such as alice-laptop
  rooms                       list rooms, also those that this device could join
  new [-rules RULES] NAME [PROVIDER...]
                              create a room and print its URI; RULES are cooperative, strict, moderated or organisations:
                              the latter has admins and users of each PROVIDER
  add [-role ROLE] ROOM PERSON...
                              add people, such as bob@beta.example, with all their devices
  remove ROOM PERSON          remove a person with all devices
  join ROOM|LINK              join a room of the user with this device, or one that a link or its rules let the user in
  role ROOM PERSON ROLE       give a person another role, such as banned
  rules ROOM                  print the room's roles, with what they may do, and its other rules
  rename ROOM NAME            give the room another name
  topic ROOM [TEXT]           say what the room is about
  link [-role ROLE] [-once] [-for TIME] ROOM
                              make a link to the room and print it: whoever has it can join, once or within a time such as
                              24h
  links ROOM                  list the links to a room, by their keys
  unlink ROOM KEY             have a link let nobody in any more; the beginning of its key is enough
  send ROOM TEXT              send a message
  reply ROOM MESSAGE TEXT     answer one
  edit ROOM MESSAGE TEXT      put another text in the place of one's own
  delete ROOM MESSAGE         take one's own back, a reaction too
  react ROOM MESSAGE EMOJI    react to one
  attach ROOM FILE [TEXT...]  send a file, with a text
  save ROOM MESSAGE FILE [N]  save the file that came with a message, or the N-th of its files, under a name that isn't taken
  report ROOM MESSAGE [NOTE]  report its sender to the operator of the room's provider
  typing ROOM [off]           tell who is connected that you are writing
  read ROOM                   tell who is connected that you have seen all messages
  tail [-n N] [ROOM]          print messages as they come; with -n the last N of the room, and exit
  members ROOM                list the people in a room and their devices
  search PROVIDER KEY=VALUE...
                              find people of a provider, such as beta.example, to whom all of it applies; a KEY is
                              handle, nick, email, phone, name or any, or a claim or property such as given_name or ORG
  profile [KEY=VALUE MODE]    print one's own profile, or set a claim or property, without VALUE delete it; others find it
                              by nothing (MODE none), by the value (exact) or by a part of it (part), and see it if MODE
                              ends in +
  consent                     list who asked to add one to rooms, whom one asked, and what was decided
  consent ask|cancel|grant|deny PERSON [ROOM]
                              ask a person, or take that back; let a person add one, or not: to a room or to any
  history ROOM DEVICE [DAYS]  let another device of one's own, such as alice-phone, have what was said in a room
  history ROOM                take what another device of one's own gives, of before this one was in the room
  leave ROOM                  leave a room with all devices
  evidence [ID]               list proofs that a hub has signed two logs of a room, or print one as a file that
                              "parley-node evidence verify" judges
  help                        this text

A ROOM is a URI, mimi://alpha.example/r/..., or the beginning of the part after r/. A MESSAGE is the beginning of what
tail shows after #.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run runs the program and returns its exit code: 0, 1 if the command failed, 2 if it was called wrongly.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("chat", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	home, err := os.UserHomeDir()
	if err != nil {
		home = "."
	}
	dir := flags.String("dir", filepath.Join(home, ".parley"), "`directory` of the device's state")
	timeout := flags.Duration("timeout", 30*time.Second, "how long a command may take")
	tcp := flags.Bool("tcp", false, "don't use QUIC")
	verbose := flags.Bool("v", false, "say what the device does")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	name, rest := flags.Arg(0), []string(nil)
	if flags.NArg() > 0 {
		rest = flags.Args()[1:]
	}
	if name == "help" {
		fmt.Fprint(stdout, usage)
		return 0
	}
	cmd, ok := commands[name]
	if !ok || !cmd.takes(len(rest)) {
		if name != "" && !ok {
			fmt.Fprintf(stderr, "chat: no command %q\n", name)
		}
		fmt.Fprint(stderr, usage)
		return 2
	}
	level := slog.LevelError
	if *verbose {
		level = slog.LevelDebug
	}
	s := &session{
		o: client.Options{
			Dir: *dir, TCPOnly: *tcp, Log: slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level})),
		},
		out: stdout, timeout: *timeout,
	}
	if err := cmd.run(ctx, s, rest); err != nil {
		if errors.Is(err, errUsage) {
			fmt.Fprint(stderr, usage)
			return 2
		}
		fmt.Fprintf(stderr, "chat: %s\n", errorText(err))
		return 1
	}
	return 0
}
