package node

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the node's Prometheus metrics, each node's own.
type metrics struct {
	registry  *prometheus.Registry
	refused   *prometheus.CounterVec   // endpoint, code
	accepted  *prometheus.CounterVec   // kind: commit, proposal, message
	followed  prometheus.Counter       // entries received from hubs
	requests  *prometheus.HistogramVec // procedure
	trimmed   prometheus.Counter       // entries of logs
	delivered prometheus.Counter       // events sent to clients
	evidence  prometheus.Counter       // contradictions of hubs
	pushed    *prometheus.CounterVec   // result
}

func newMetrics(n *Node) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "parley_refused_total", Help: "Requests refused, by endpoint and code.",
		}, []string{"endpoint", "code"}),
		accepted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "parley_accepted_total", Help: "Messages that this node ordered as a hub, by kind.",
		}, []string{"kind"}),
		followed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "parley_followed_total", Help: "Log entries received from hubs.",
		}),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "parley_request_seconds", Help: "Duration of clients' requests, streams excepted.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"procedure"}),
		trimmed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "parley_trimmed_total", Help: "Entries of logs that this node has let go of.",
		}),
		delivered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "parley_events_total", Help: "Events sent to clients' streams.",
		}),
		pushed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "parley_pushed_total", Help: "Wake-ups of clients, by what became of them.",
		}, []string{"result"}),
		evidence: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "parley_evidence_total", Help: "Times that a hub has contradicted a head that it has signed.",
		}),
	}
	m.registry.MustRegister(m.refused, m.accepted, m.followed, m.trimmed, m.requests, m.delivered, m.evidence, m.pushed,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "parley_streams", Help: "Open event streams.",
		}, func() float64 { return float64(n.listeners.count()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "parley_disk_free_bytes", Help: "Space that was free on the data directory's disk.",
		}, func() float64 { return float64(n.disk.last.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "parley_read_only", Help: "1 while the node takes in nothing, since its disk is nearly full.",
		}, func() float64 {
			if n.disk.full.Load() {
				return 1
			}
			return 0
		}),
		peerCollector{n},
	)
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// peerCollector reports what is there for each approved peer at the time of asking.
type peerCollector struct{ n *Node }

var (
	outboxDepth = prometheus.NewDesc("parley_outbox_items", "What waits to be sent to a peer.", []string{"peer"}, nil)
	outboxGone  = prometheus.NewDesc("parley_outbox_dropped_total", "What was dropped since the node started because too much waited for a peer.", []string{"peer"}, nil)
	peerAlive   = prometheus.NewDesc("parley_peer_alive", "Whether gossip sees a peer alive.", []string{"peer"}, nil)
)

// Describe implements prometheus.Collector.
func (c peerCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- outboxDepth
	ch <- outboxGone
	ch <- peerAlive
}

// Collect implements prometheus.Collector.
func (c peerCollector) Collect(ch chan<- prometheus.Metric) {
	for _, p := range c.n.peers() {
		if !p.Approved {
			continue
		}
		alive := 0.0
		if p.Alive {
			alive = 1
		}
		ch <- prometheus.MustNewConstMetric(outboxDepth, prometheus.GaugeValue, float64(p.Waiting), p.Domain)
		ch <- prometheus.MustNewConstMetric(outboxGone, prometheus.CounterValue, float64(p.Dropped), p.Domain)
		ch <- prometheus.MustNewConstMetric(peerAlive, prometheus.GaugeValue, alive, p.Domain)
	}
}
