package node

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestConfigFilesLoad(t *testing.T) {
	files, err := filepath.Glob("../configs/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no configurations: %v", err)
	}
	for _, f := range files {
		cfg, err := LoadConfig(f)
		if err != nil {
			t.Error(err)
			continue
		}
		if want := strings.TrimSuffix(filepath.Base(f), ".yaml") + ".example"; cfg.Domain != want {
			t.Errorf("%s is for %s", f, cfg.Domain)
		}
	}
}

const minimal = "domain: alpha.example\ndata: d\nlisten: 127.0.0.1:0\n"

func TestConfigHasDefaults(t *testing.T) {
	cfg, err := ParseConfig([]byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Gossip != "lan" || len(cfg.Suites) == 0 || cfg.Limits.RequestBytes != 16<<20 || cfg.Limits.Streams != 4 {
		t.Errorf("the defaults are %+v", cfg)
	}
	if level, err := cfg.Log.level(); err != nil || level != slog.LevelInfo {
		t.Errorf("the level is %v (%v)", level, err)
	}
	if got := cfg.Socket(); got != filepath.Join("d", "admin.sock") {
		t.Errorf("the socket is %s", got)
	}
}

func TestConfigHelpTellsTheDefaults(t *testing.T) {
	cfg, err := ParseConfig([]byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	var help Config
	d := yaml.NewDecoder(strings.NewReader(ConfigHelp[strings.Index(ConfigHelp, "domain:"):]))
	d.KnownFields(true)
	if err := d.Decode(&help); err != nil {
		t.Fatal(err)
	}
	if help.Retention != cfg.Retention {
		t.Errorf("the help has the retention %+v, the default is %+v", help.Retention, cfg.Retention)
	}
	if help.Limits != cfg.Limits {
		t.Errorf("the help has the limits\n%+v, the defaults are\n%+v", help.Limits, cfg.Limits)
	}
}

func TestConfigErrorsNameTheField(t *testing.T) {
	f := strings.Repeat("ab", 32)
	for _, c := range []struct{ text, field string }{
		{"data: d\nlisten: 127.0.0.1:1\n", "domain:"},
		{"domain: ALPHA.example\ndata: d\nlisten: 127.0.0.1:1\n", "domain:"},
		{"domain: alpha.example\nlisten: 127.0.0.1:1\n", "data:"},
		{"domain: alpha.example\ndata: d\n", "listen:"},
		{"domain: alpha.example\ndata: d\nlisten: somewhere\n", "listen:"},
		{minimal + "advertise: 127.0.0.1:0\n", "advertise:"},
		{minimal + "advertise: :7440\n", "advertise:"},
		{minimal + "gossip: loud\n", "gossip:"},
		{minimal + "consent: maybe\n", "consent:"},
		{minimal + "search: maybe\n", "search:"},
		{minimal + "push: maybe\n", "push:"},
		{minimal + "suites: [1, 4]\n", "suites[1]:"},
		{minimal + "suites: [1, 1]\n", "suites[1]:"},
		{minimal + "peers: [{domain: beta.example}]\n", "peers[0].fingerprint:"},
		{minimal + "peers: [{domain: beta.example, fingerprint: xyz}]\n", "peers[0].fingerprint:"},
		{minimal + "peers: [{domain: alpha.example, fingerprint: " + f + "}]\n", "peers[0].domain:"},
		{minimal + "peers: [{domain: beta.example, fingerprint: " + f + ", address: nowhere}]\n", "peers[0].address:"},
		{minimal + "limits: {streams: -1}\n", "limits.streams:"},
		{minimal + "retention: {days: -1}\n", "retention.days:"},
		{minimal + "retention: {days: 3, stored_days: 4}\n", "retention.stored_days:"},
		{minimal + "log: {level: loud}\n", "log.level:"},
		{minimal + "log: {format: xml}\n", "log.format:"},
		{minimal + "colour: blue\n", "colour"},
		{minimal + "---\ndomain: beta.example\n", "second document"},
	} {
		if _, err := ParseConfig([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%q: %v, want an error that names %s", c.text, err, c.field)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(ConfigHelp))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, err := ParseConfig(b)
		if err != nil {
			return
		}
		if again := cfg; again.complete() != nil {
			t.Errorf("a valid configuration isn't valid again: %+v", cfg)
		}
	})
}
