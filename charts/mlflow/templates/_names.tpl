{{- define "mlflow.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end -}}

{{- define "mlflow.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mlflow.server" -}}
{{ include "mlflow.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "mlflow.labels" -}}
{{ include "mlflow.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: bit-mlops
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "mlflow.account" -}}
{{- with .Values.serviceAccount -}}
{{ default (ternary (include "mlflow.fullname" $) "default" .create) .name }}
{{- end -}}
{{- end -}}

{{- define "mlflow.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "mlflow.container" -}}
{{- /* Image: another one than the server's. */ -}}
{{- with .Image -}}
image: {{ . }}
{{- else -}}
image: {{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ end }}
{{- end }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
resources: {{- toYaml .Values.resources | nindent 2 }}
{{- end -}}

{{- /* Postgres' address as the rest of an environment variable; empty: SQLite. */ -}}
{{- define "mlflow.postgres" -}}
{{- with .Values.database }}
{{- if .existingSecret -}}
valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: uri}}
{{- else if .url -}}
value: {{ .url | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Where the database is: Postgres, or SQLite on the volume. */ -}}
{{- define "mlflow.database" -}}
- name: MLFLOW_BACKEND_STORE_URI
  {{- include "mlflow.postgres" . | default "value: sqlite:////data/mlflow.db" | nindent 2 }}
{{- end -}}

{{- /* Where accounts are: beside the rest in Postgres, or in a file of their own. */ -}}
{{- define "mlflow.accounts" -}}
- name: ACCOUNTS_URI
  {{- include "mlflow.postgres" . | default "value: sqlite:////data/accounts.db" | nindent 2 }}
{{- end -}}

{{- /* Whether the server itself needs the volume; any text is yes. */ -}}
{{- define "mlflow.local" -}}
{{- if or (eq (include "mlflow.postgres" .) "") (not (contains "://" .Values.artifacts.destination)) -}}yes{{- end -}}
{{- end -}}

{{- define "mlflow.hosts" -}}
{{- $name := include "mlflow.fullname" . -}}
{{- $port := int .Values.service.port -}}
{{- range $host := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) "localhost" "127.0.0.1" -}}
{{ $host }},{{ $host }}:{{ $port }},
{{- end -}}
{{ join "," .Values.allowedHosts }}
{{- end -}}
